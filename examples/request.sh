#!/usr/bin/env bash
# The documented request. Set URL, TOKEN, ORG, SECRET_ID and DATASET (s3://bucket/key); the rest has the documented values.
set -euo pipefail
: "${URL:?}" "${TOKEN:?}" "${ORG:?}" "${SECRET_ID:?}" "${DATASET:?}"
NAME=${NAME:-launch-causal_lm-lora}
BASE_MODEL=${BASE_MODEL:-meta-llama/Llama-3.2-1B-Instruct}
MAX_LENGTH=${MAX_LENGTH:-4096}
STEPS=${STEPS:-'"save_steps":500,"eval_steps":500,"logging_steps":5'}

curl -sS -X POST "$URL/job/" -H "Authorization: Bearer $TOKEN" \
  --form "org=$ORG" \
  --form "experiment_name=$NAME" \
  --form 'dataset_config={"preprocessing":{"lazy_tokenize":true,"streaming":false,
            "prompt":{"system":null,"max_length":'"$MAX_LENGTH"',"template":null}},
            "split":{"type":"random","ratios":[0.9,0.1]}}' \
  --form 'model_details={"base_model":"'"$BASE_MODEL"'","ownership":"public","source_type":"hf",
            "model_type":"llm","quantization":{"quant_bits":4}}' \
  --form 'train_config={"type":"sft","torch_dtype":"bfloat16","task_type":"causal_lm","train_type":"lora",
            "tuner_backend":"simplismart",
            "hyperparameters":{"num_epochs":1,"per_device_train_batch_size":8,"per_device_eval_batch_size":8,
              "gradient_checkpointing":true,"save_total_limit":2,'"$STEPS"',
              "learning_rate":0.0001,"dataloader_num_workers":1},
            "adapter_config":{"r":16,"alpha":16,"dropout":0.1,"targets":["all-linear"]},
            "distributed":{"type":"ddp"}}' \
  --form 'dataset_details={"dataset_name":"dataset-name","dataset_path":"'"$DATASET"'",
            "dataset_description":"","dataset_type":"jsonl","dataset_format":"sharegpt","source_type":"s3",
            "ownership":"private","secret_id":"'"$SECRET_ID"'","region":"us-west-2"}' \
  --form 'infra_config={"gpu_type":"h100","gpu_count":2,"infra_type":"simplismart","node_count":2}'
echo
