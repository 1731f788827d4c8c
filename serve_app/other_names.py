"""Fields of a job by what OpenAI's API, TRL, PEFT and axolotl call them, where the nearest name of ours is none or misleads."""

from __future__ import annotations

_HP, _ADAPTER = "train_config.hyperparameters", "train_config.adapter_config"
_PRE = "dataset_config.preprocessing"
OTHER_NAMES = {
    **dict.fromkeys(("rank", "lora_r", "lora_rank"), f"{_ADAPTER}.r"),
    "lora_alpha": f"{_ADAPTER}.alpha",
    "lora_dropout": f"{_ADAPTER}.dropout",
    **dict.fromkeys(
        ("target_modules", "lora_target_modules", "lora_trainable_modules", "lora_target_linear"), f"{_ADAPTER}.targets"
    ),
    **dict.fromkeys(("gradient_clipping", "max_norm"), f"{_HP}.max_grad_norm"),
    "n_checkpoints": f"{_HP}.save_total_limit",
    "random_seed": f"{_HP}.seed",
    **dict.fromkeys(("dtype", "bf16", "fp16"), "train_config.torch_dtype"),
    **dict.fromkeys(
        ("max_seq_length", "max_seq_len", "cutoff_len", "sequence_len", "model_max_length"), f"{_PRE}.prompt.max_length"
    ),
    **dict.fromkeys(("chat_template", "chat_template_jinja"), f"{_PRE}.prompt.template"),
    **dict.fromkeys(("train_on_inputs", "train_on_input", "assistant_only_loss"), f"{_PRE}.train_on"),
    "sample_packing": f"{_PRE}.packing",
    **dict.fromkeys(("val_set_size", "validation_split", "test_size"), "dataset_config.split.ratios"),
    **dict.fromkeys(("validation_file", "eval_dataset"), "dataset_config.split.eval_path"),
    **dict.fromkeys(("training_file", "train_dataset", "datasets"), "dataset_details.dataset_path"),
    **dict.fromkeys(("model", "model_name", "model_name_or_path"), "model_details.base_model"),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "model_details.quantization.quant_bits"),
    **dict.fromkeys(("token", "hf_token"), "model_details.secret_id"),
    **dict.fromkeys(("suffix", "run_name"), "experiment_name"),
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus"), "infra_config.gpu_count"),
    **dict.fromkeys(("nodes", "num_nodes", "nnodes"), "infra_config.node_count"),
    "instance_type": "infra_config.gpu_type",
    "timeout": "infra_config.max_runtime_s",
}
OTHER_VALUES = {"qlora": "lora with model_details.quantization"}
