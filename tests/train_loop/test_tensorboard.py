from train_loop import tensorboard
from train_loop.layout import TENSORBOARD


def test_other_readers_find_every_point_once(tmp_path):
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter

    points = [
        {"step": 0, "eval_loss": 3.0, "time": 1.5},
        {"step": 5, "loss": 2.5, "learning_rate": 0.1, "grad_norm": 1.0, "epoch": 0.5, "tokens_per_second": 9.0, "time": 2.5},
    ]
    data = tensorboard.start() + b"".join(map(tensorboard.event, points))
    assert "tfevents" in TENSORBOARD  # by which TensorBoard knows the file
    events, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 8], "little")
        events.append(Event.FromString(data[at + 12 : at + 12 + length]))
        at += 16 + length
    writer = RecordWriter(str(tmp_path / "theirs"))
    for event in events:
        writer.write(event.SerializeToString())
    writer.close()
    assert (tmp_path / "theirs").read_bytes() == data, "checksums and framing are tensorboardX's own"
    assert events[0].file_version == "brain.Event:2"
    values = [(e.step, e.wall_time, {v.tag: v.simple_value for v in e.summary.value}) for e in events[1:]]
    assert values[0] == (0, 1.5, {"eval/loss": 3.0})
    assert values[1][0] == 5
    assert values[1][2]["train/loss"] == 2.5
    assert set(values[1][2]) == {"train/loss", "train/learning_rate", "train/grad_norm", "train/epoch", "train/tokens_per_second"}
