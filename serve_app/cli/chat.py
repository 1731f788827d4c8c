"""Talk to a job's result, next to its base model."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve_app.cli.common import AsJson, Org, RequestId, Token, Url, app, client_for, die, org_of

if TYPE_CHECKING:
    from serve_app.client import JobAnswer
    from train_loop.data.images import Picture


@app.command()
def chat(
    request_id: RequestId,
    prompt: Annotated[str | None, typer.Option(help="Ask this once; without it, ask as long as you like.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture to ask about, of a vlm; may be given again.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    org: Org = None,
    url: Url = None,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Compare the base model's answers with those of what a job trained."""
    org = org_of(org)
    job = client_for(url, token, org).get(request_id, org)
    if job["status"] != "COMPLETED" or job["output_model_path"] is None:
        die(f"job {request_id} is {job['status']}: there is nothing to talk to")
    if image and job["model_details"]["model_type"] != "vlm":
        die(f"job {request_id} trained an llm, which sees no images")
    max_pixels = job["dataset_config"]["preprocessing"].get("max_pixels")
    pictures = [_picture(file, max_pixels) for file in image or ()]
    with tempfile.TemporaryDirectory(prefix="tuneyard-") as folder:
        answers = _chat_model(job, job["output_model_path"], Path(folder))
        if prompt is not None:
            _show(prompt, answers(prompt, max_new_tokens, pictures), as_json)
            return
        while True:
            try:
                _show(asked := typer.prompt("you"), answers(asked, max_new_tokens, pictures), as_json)
            except (EOFError, KeyboardInterrupt, typer.Abort):
                return


def _picture(file: Path, max_pixels: int | None) -> Picture:
    from train_loop.data.formats import RowRejected
    from train_loop.data.images import admit

    try:
        return admit(file.read_bytes(), max_pixels)
    except OSError as error:
        die(f"{file} can't be read: {error.strerror}", 2)
    except RowRejected as error:
        die(f"{file} {error.reason}", 2)


def _chat_model(job: JobAnswer, uri: str, folder: Path) -> Any:
    from pyarrow.fs import LocalFileSystem, copy_files

    from serve_app.settings import Settings
    from serve_app.storage import storage_credentials
    from train_loop.chat import Comparison
    from train_loop.data.sources import filesystem_for
    from train_loop.model.source import ModelPlaces, model_folder
    from train_loop.spec import DatasetConfig, ModelDetails

    settings = Settings.load()
    keys = storage_credentials(settings)
    source, path = filesystem_for(uri, keys)
    try:
        copy_files(path, str(folder), source_filesystem=source, destination_filesystem=LocalFileSystem())
    except OSError as error:
        die(f"the files at {uri} can't be read: {str(error).splitlines()[0]}")
    details = ModelDetails.model_validate(job["model_details"])
    places = ModelPlaces(settings.model_mirror, open_mirror=lambda uri: filesystem_for(uri, keys))
    prompt = DatasetConfig.model_validate(job["dataset_config"]).preprocessing.prompt
    return Comparison.load(model_folder(details, places), folder, details, prompt).answer


def _show(prompt: str, answers: tuple[str, str], as_json: bool) -> None:
    base, tuned = answers
    if as_json:
        typer.echo(json.dumps({"prompt": prompt, "base": base, "tuned": tuned}))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Text, or rich would take [brackets] for its markup.
    table = Table("base model", "yours", title=Text(prompt), expand=True, show_lines=True)
    table.add_row(Text(base), Text(tuned))
    Console().print(table)
