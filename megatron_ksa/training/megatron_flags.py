"""All of Megatron 0.19.2's arguments: those that work, those refused with KSA or HARPE, and those refused always.

A flag that would do nothing is refused, so that nobody waits for what it promises. An argument that a new Megatron adds
has no place here until somebody has looked at who reads it (tests/training/test_megatron_flags.py).
"""


class Refused:
    """Flags that are refused for one reason."""

    def __init__(self, why: str, flags: str) -> None:
        self.why, self.flags = why, frozenset(flags.split())


def _flags(words: str) -> frozenset[str]:
    return frozenset(words.split())


# With KSA and HARPE and without.
WORKS = _flags("""
    --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split --accumulate-allreduce-grads-in-fp32
    --activation-func-clamp-value --adam-beta1 --adam-beta2 --adam-eps --add-qkv-bias --adlr-autoresume
    --adlr-autoresume-interval --allow-ambiguous-pad-tokens --app-tag-run-name --app-tag-run-version
    --apply-layernorm-1p --apply-wd-to-qk-layernorm --async-ckpt-cpu-priority --async-ckpt-io-priority
    --async-ckpt-use-cpu-shm --async-save --async-strategy --attention-softmax-in-fp32 --auto-detect-ckpt-format --bf16
    --calc-ft-timeouts --calculate-per-token-loss --chat-template --check-for-large-grads --check-for-spiky-loss
    --check-weight-hash-across-dp-replicas-interval --ckpt-assume-constant-structure --ckpt-convert-format
    --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format --ckpt-format --ckpt-fully-parallel-load
    --ckpt-fully-parallel-load-exchange-algo --ckpt-fully-parallel-load-process-group --ckpt-fully-parallel-save
    --ckpt-fully-parallel-save-process-group --ckpt-step --clip-grad --config-logger-dir --cross-entropy-fusion-impl
    --cross-entropy-loss-fusion --cuda-graph-modules --cuda-graph-scope --cuda-graph-warmup-steps --data-args-path
    --data-cache-path --data-parallel-random-init --data-parallel-sharding-strategy --data-path
    --dataloader-defer-npy-index-mmap --dataloader-fast-cache-load --dataloader-type --ddp-average-in-collective
    --ddp-bucket-size --ddp-num-buckets --ddp-pad-buckets-for-high-nccl-busbw
    --ddp-param-name-patterns-for-fp32-local-accumulation --ddp-reduce-scatter-with-fp32-accumulation
    --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --decoupled-lr --decoupled-min-lr
    --decrease-batch-size-if-needed --defer-embedding-wgrad-compute --deterministic-mode
    --disable-bf16-reduced-precision-matmul --disable-bias-linear --disable-gloo-process-groups --disable-jit-fuser
    --disable-msc --disable-straggler-on-startup --disable-symmetric-registration --dist-ckpt-format
    --dist-ckpt-optim-fully-reshardable --dist-ckpt-strictness --dist-ckpt-workers
    --distrib-optim-fully-reshardable-mem-efficient --distribute-saved-activations --distributed-backend
    --distributed-timeout-minutes --distributed-timeout-seconds-after-init --dump-param-to-param-group-map
    --embedding-init-method-std --empty-unused-memory-level --enable-experimental --enable-ft-package
    --encoder-num-layers --encoder-seq-length --end-weight-decay --eod-mask-loss --error-injection-rate
    --error-injection-type --eval-global-batch-size --eval-interval --eval-iters --eval-micro-batch-size
    --exit-duration-in-mins --exit-interval --exit-on-missing-checkpoint --exit-signal --exit-signal-handler
    --exit-signal-handler-for-training --exp-avg-dtype --exp-avg-sq-dtype --expert-model-parallel-size
    --expert-tensor-parallel-num-weight-shards --expert-tensor-parallel-size --fake-process-group
    --fault-injector-delay-start-iteration --fault-injector-fault-delay --fault-injector-fault-probabilities
    --fault-injector-fault-types --fault-injector-mtti-seconds --fault-injector-num-ranks
    --fault-injector-offset-seconds --fault-injector-ranks --fault-injector-seed --ffn-hidden-size --fim-data
    --fim-eod-token --fim-fragment-rate --fim-middle-token --fim-no-prefix --fim-pad-token --fim-prefix-token
    --fim-rate --fim-split-sample --fim-spm-rate --fim-suffix-token --finetune --first-last-layers-bf16
    --flight-recorder-dump-path --flight-recorder-include-stack-trace --flight-recorder-trace-buffer-size --fp16
    --fp16-lm-cross-entropy --fp32-residual-connection --fp8-amax-compute-algo --fp8-amax-history-len --fp8-margin
    --freeze-all-layers --fsdp-db-use-persist-buf-on-alloc-fail --fsdp-double-buffer --fsdp-manual-registration
    --ft-num-warmup-iters --full-validation --global-batch-size --glu-linear-offset --gpu-sniff-test-interval
    --grad-reduce-in-bf16 --group-query-attention --hidden-dropout --hidden-size --high-priority-stream-groups
    --hysteresis --inference-rng-tracker --init-method-std --initial-loss-scale --iterations-to-skip --kv-channels
    --lion-beta1 --lion-beta2 --load --load-main-params-from-ckpt --local-rank --log-device-memory-used --log-energy
    --log-interval --log-memory-interval --log-memory-to-tensorboard --log-num-zeros-in-grad --log-params-norm
    --log-progress --log-straggler --log-throughput --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard
    --log-world-size-to-tensorboard --logging-level --logits-load-decode-threads --logits-load-dir
    --logits-load-ignore-errors --logits-load-kd-loss-alpha --logits-load-msc-prefetch-depth
    --logits-load-prefetch-factor --logits-save-dir --logits-save-dtype --logits-save-top-k --logits-save-top-p
    --logits-save-top-p-min-k --loss-scale --loss-scale-window --lr --lr-decay-iters --lr-decay-samples
    --lr-decay-style --lr-warmup-fraction --lr-warmup-init --lr-warmup-iters --lr-warmup-samples --lr-wsd-decay-iters
    --lr-wsd-decay-samples --lr-wsd-decay-style --main-grads-dtype --main-params-dtype --make-vocab-size-divisible-by
    --manual-gc --manual-gc-interval --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-grad-comm-dtype
    --megatron-fsdp-main-grads-dtype --megatron-fsdp-main-params-dtype --megatron-fsdp-max-pool-double-buffer
    --memory-snapshot-path --merge-file --micro-batch-size --microbatch-group-size-per-virtual-pipeline-stage
    --mid-level-dataset-surplus --min-loss-scale --min-lr --mlp-chunks-for-training --mock-data
    --moe-apply-probs-on-input --moe-aux-loss-coeff --moe-deepep-num-sms --moe-enable-deepep
    --moe-expert-capacity-factor --moe-expert-rank-capacity-factor --moe-ffn-hidden-size --moe-flex-dispatcher-backend
    --moe-flex-dispatcher-num-sms --moe-grouped-gemm --moe-hybridep-num-blocks-permute
    --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms --moe-hybridep-num-sms-preprocessing
    --moe-hybridep-pad-uneven-dispatch-inputs --moe-input-jitter-eps --moe-latent-size --moe-layer-freq
    --moe-layer-recompute --moe-mlp-glu-interleave-size --moe-ncclep-static-shape --moe-ncclep-zero-copy
    --moe-pad-expert-input-to-capacity --moe-paged-stash --moe-paged-stash-buffer-size-factor-cpu
    --moe-paged-stash-buffer-size-factor-cuda --moe-paged-stash-page-size --moe-per-layer-logging --moe-permute-fusion
    --moe-permute-fusion-into-hybridep --moe-router-bias-update-rate --moe-router-dtype --moe-router-enable-expert-bias
    --moe-router-force-biased --moe-router-force-load-balancing --moe-router-fusion --moe-router-group-topk
    --moe-router-load-balancing-type --moe-router-num-groups --moe-router-padding-for-fp8
    --moe-router-padding-for-quantization --moe-router-pre-softmax --moe-router-quantile-balancing-ema
    --moe-router-score-function --moe-router-topk --moe-router-topk-scaling-factor
    --moe-routing-trace-capture-hidden-states --moe-routing-trace-capture-logits --moe-routing-trace-dump-weights
    --moe-routing-trace-max-training-iters --moe-routing-trace-path --moe-shared-expert-gate
    --moe-shared-expert-glu-interleave-size --moe-shared-expert-intermediate-size --moe-shared-expert-overlap
    --moe-single-grouped-bias --moe-single-grouped-weight --moe-token-dispatcher-type --moe-token-drop-policy
    --moe-z-loss-coeff --multiple-validation-sets --muon-coefficient-type --muon-extra-scale-factor
    --muon-fp32-matmul-prec --muon-momentum --muon-nesterov --muon-no-split-qkv --muon-num-ns-steps
    --muon-scalar-optimizer --muon-scale-mode --muon-tp-mode --mup-attn-scale-power --mup-base-head-dim
    --mup-base-hidden-size --mup-embedding-mult --mup-output-mult --mup-width-mult --nccl-communicator-config-path
    --no-align-grad-reduce --no-align-param-gather --no-barrier-with-level-1-timing --no-bias-dropout-fusion
    --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-check-for-nan-in-loss-and-grad --no-ckpt-fully-parallel-save
    --no-ckpt-load-validate-sharding-integrity --no-clone-scatter-output-in-embedding
    --no-create-attention-mask-in-dataloader --no-flight-recorder-dump-on-timeout
    --no-flight-recorder-extra-dump-on-exec --no-flight-recorder-include-only-active --no-fp8-wgrad
    --no-gradient-accumulation-fusion --no-gradient-reduce-div-fusion --no-initialization --no-load-optim --no-load-rng
    --no-log-loss-scale-to-tensorboard --no-manual-gc-eval --no-masked-softmax-fusion --no-mmap-bin-files
    --no-one-logger --no-overlap-p2p-communication --no-pad-vocab-size --no-persist-layer-norm --no-pin-cpu-grads
    --no-pin-cpu-params --no-rope-fusion --no-save-optim --no-save-rng --no-stream-ckpt-dequant
    --no-strict-fsdp-dtensor-load --no-tokenizer-sentencepiece-ignore-extra-whitespaces --no-tp-comm-bulk-dgrad
    --no-tp-comm-bulk-wgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs --no-tp-comm-split-ag --no-tp-comm-split-rs
    --no-use-tokenizer-model-from-checkpoint-args --no-weight-decay-cond-type --non-persistent-ckpt-type
    --non-persistent-global-ckpt-dir --non-persistent-local-ckpt-algo --non-persistent-local-ckpt-dir
    --non-persistent-save-interval --norm-epsilon --normalization --null-tokenizer-eod-id --null-tokenizer-pad-id
    --num-attention-heads --num-dataset-builder-threads --num-distributed-optimizer-instances --num-experts
    --num-layers --num-layers-at-end-in-bf16 --num-layers-at-start-in-bf16 --num-layers-per-virtual-pipeline-stage
    --num-virtual-stages-per-pipeline-rank --num-workers --nvtx-ranges --object-storage-cache-path --one-logger-async
    --one-logger-project --one-logger-run-name --openai-gelu --optimizer --optimizer-cpu-offload --optimizer-cuda-graph
    --optimizer-offload-fraction --outer-dp-sharding-strategy --overlap-cpu-optimizer-d2h-h2d --overlap-grad-reduce
    --overlap-p2p-communication-warmup-flush --overlap-param-gather --overlap-param-gather-with-optimizer-step
    --override-ckpt-iteration --override-opt_param-scheduler --padded-vocab-size --per-dataset-sequences-path
    --per-split-data-args-path --phase-transition-iterations --pipeline-model-parallel-comm-backend
    --pipeline-model-parallel-layout --pipeline-model-parallel-size --pretrained-checkpoint --profile --profile-ranks
    --profile-step-end --profile-step-start --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra
    --pytorch-profiler-collect-shapes --qk-layernorm --quick-geglu --recompute-activations --recompute-granularity
    --recompute-method --recompute-modules --recompute-num-layers --record-memory-history --record-shapes --replication
    --replication-factor --replication-jump --rerun-mode --result-rejected-tracker-filename --rope-scaling-factor
    --rotary-base --rotary-interleaved --rotary-percent --rotary-seq-len-interpolation-factor
    --run-workload-inspector-server --save --save-activations-interval --save-dgrads-interval --save-interval
    --save-params-interval --save-retain-interval --save-tokens-per-expert-interval --save-wgrads-interval --seed
    --sgd-momentum --sharp-enabled-group --skip-train --split --squared-relu --start-eval-at-iter --start-weight-decay
    --step-batch-size-schedule --straggler-ctrlr-port --straggler-minmax-count --suggested-communication-unit-size
    --swiglu --symmetric-ar-type --te-rng-tracker --tensor-parallel-num-weight-shards --tensorboard-dir
    --tensorboard-log-interval --tensorboard-queue-size --test-data-path --tiktoken-num-special-tokens
    --tiktoken-pattern --timing-log-level --timing-log-option --tokenizer-hf-no-include-special-tokens
    --tokenizer-hf-no-use-fast --tokenizer-metadata --tokenizer-model --tokenizer-sentencepiece-legacy
    --tokenizer-special-tokens --tokenizer-type --torch-fsdp2-no-reshard-after-forward --tp-comm-bootstrap-backend
    --tp-comm-overlap-cfg --tp-comm-overlap-rs-dgrad --train-data-path --train-iters --train-samples
    --train-sync-interval --transformer-impl --trust-remote-code --untie-embeddings-and-output-weights
    --use-checkpoint-args --use-checkpoint-opt_param-scheduler --use-cpu-initialization --use-dist-ckpt
    --use-distributed-optimizer --use-fused-weighted-squared-relu --use-grouped-gemm-for-shared-expert
    --use-mcore-models --use-megatron-fsdp --use-mp-args-from-checkpoint-args --use-mup --use-nccl-ub
    --use-persistent-ckpt-worker --use-precision-aware-optimizer --use-pytorch-profiler --use-ring-exchange-p2p
    --use-sharp --use-torch-fsdp2 --use-torch-optimizer-for-cpu-offload --use-tp-pp-dp-mapping --valid-data-path
    --validation-set-names --verify-integrity --vocab-file --vocab-size --wandb-entity --wandb-exp-name --wandb-project
    --wandb-save-dir --weight-decay --weight-decay-incr-style --wgrad-deferral-limit
""")

# Without KSA and HARPE; with them some values are refused, by `settings_from_args`.
VALUES_DECIDE = _flags("""
    --attention-dropout --attention-output-gate --context-parallel-size --cp-comm-type --cuda-graph-impl
    --enable-cuda-graph --external-cuda-graph --flash-decode --fp8-format --fp8-recipe --max-position-embeddings
    --multi-latent-attention --num-query-groups --position-embedding-type --qk-l2-norm --reset-attention-mask
    --reset-position-ids --seq-length --sequence-parallel --tensor-model-parallel-size --tp-comm-overlap
    --use-rope-scaling
    --use-transformer-engine-op-fuser
""")

# Without KSA and HARPE alone: Megatron's own model and trainer.
WITHOUT_KSA = (
    Refused(
        "multi-latent attention has no K/V heads to share: drop it",
        """
        --cache-mla-latents --kv-lora-rank --mla-down-proj-fusion --mscale --mscale-all-dim --q-lora-rank
        --qk-head-dim --qk-pos-emb-head-dim --rotary-scaling-factor --v-head-dim
        """,
    ),  # fmt: skip
    Refused(
        "it is about attention that Megatron builds, and this is the project's own: drop it",
        """
        --apply-query-key-layer-scaling --attention-backend --batch-invariant-mode --dsa-indexer-head-dim
        --dsa-indexer-k-norm-epsilon --dsa-indexer-k-norm-fp32 --dsa-indexer-loss-coeff --dsa-indexer-n-heads
        --dsa-indexer-rope-interleaved --dsa-indexer-skip-topk-offset --dsa-indexer-topk --dsa-indexer-topk-freq
        --dsa-indexer-use-sparse-loss --dsa-kernel-backend --experimental-attention-variant
        --flash-attention-version --hierarchical-context-parallel-sizes --kitchen-attention-backend
        --linear-attention-freq --linear-conv-kernel-dim --linear-key-head-dim --linear-num-key-heads
        --linear-num-value-heads --linear-value-head-dim --log-max-attention-logit
        --no-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu --no-rope-freq --qk-clip
        --qk-clip-alpha --qk-clip-threshold --softmax-type --test-mode --use-kitchen-attention
        --window-attn-skip-freq --window-size
        """,
    ),  # fmt: skip
    Refused(
        "it is about positions other than --position-embedding-type rope, harpe and none: drop it",
        """
        --mrope-section --no-position-embedding --no-yarn-correction-range-round-to-int --rope-type
        --use-rotary-position-embeddings --yarn-beta-fast --yarn-beta-slow --yarn-correction-range-round-to-int
        --yarn-original-max-position-embeddings
        """,
    ),  # fmt: skip
    Refused(
        "multi-token prediction layers are not supported: drop it",
        """
        --mtp-detach-heads --mtp-loss-scaling-factor --mtp-num-layers --mtp-standalone --mtp-use-repeated-layer
        """,
    ),  # fmt: skip
    Refused(
        "the layer specs are this project's own: drop it",
        """
        --fused-residual-rmsnorm --heterogeneous-layers-config-encoded-json --heterogeneous-layers-config-path
        --init-model-with-meta-device --spec --use-grouped-gemm-for-dense-mlp --use-te-activation-func
        """,
    ),  # fmt: skip
    Refused(
        "its projections were compared with 16 bits in FP8 of the recipes delayed, tensorwise and blockwise alone: use "
        "--fp8-format and --fp8-recipe",
        """
        --fp4-format --fp4-param-gather --fp4-quantizer-factory --fp4-recipe --fp8-output-proj --fp8-param-gather
        --fp8-quantizer-factory --keep-fp8-transpose-cache --reuse-grad-buf-for-mxfp8-param-ag
        --te-precision-config-file
        """,
    ),  # fmt: skip
    Refused(
        "offloading is not checked with this project's attention: use --recompute-granularity",
        """
        --activation-offload-fraction --cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks
        --fine-grained-activation-offloading --fine-grained-offloading-max-inflight-offloads
        --min-offloaded-tensor-size --offload-modules
        """,
    ),  # fmt: skip
    Refused(
        "it takes layers apart in a way that this project's attention does not: drop it",
        """
        --delay-wgrad-compute --ep-overlap-early-attn-memory-release --high-priority-a2a-comm-stream
        --overlap-dispatch-backward-with-experts-wgrad --overlap-moe-expert-parallel-comm
        """,
    ),  # fmt: skip
    Refused(
        "pipeline stages exchange text and summary rows, whose number follows from --seq-length: drop it",
        "--decoder-seq-length",
    ),
    Refused("what a checkpoint in such a storage holds is not compared with the flags: use a folder", "--enable-msc"),
)

# Never: nothing that `pretrain` runs reads them, or what reads them is not part of this trainer.
NEVER = (
    Refused(
        "it belongs to Megatron's reinforcement learning, and this trainer pretrains",
        """
        --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-entropy-term-weight
        --grpo-filter-groups-with-same-reward --grpo-group-size --grpo-iterations --grpo-kl-beta
        --grpo-prompts-per-step --langrl-env-config --perform-rl-step --refit-method
        --rl-consumption-granularity --rl-default-temperature --rl-default-top-k --rl-default-top-p
        --rl-generation-lag --rl-importance-sampling-truncation-coef --rl-inference-expert-model-parallel-size
        --rl-inference-expert-tensor-model-parallel-size --rl-inference-logprobs-is-correction
        --rl-inference-model-unified-memory-level --rl-inference-parsers
        --rl-inference-pipeline-model-parallel-size --rl-inference-tensor-model-parallel-size
        --rl-kv-cache-management-mode --rl-offload-inference-model-weights-when-idle
        --rl-offload-optimizer-during-inference --rl-partial-rollouts --rl-persist-cuda-graphs --rl-profile
        --rl-profile-dir --rl-prompts-per-eval --rl-sequence-packing-algo
        --rl-sequence-packing-max-sequences-per-bin --rl-skip-bos-token --rl-submission-granularity
        --rl-training-cuda-graphs --rl-use-sequence-packing --rl-verify-model-weights-swap
        """,
    ),  # fmt: skip
    Refused(
        "it belongs to Megatron's vision and retrieval models, and this trainer builds GPT models",
        """
        --bert-load --biencoder-projection-dim --biencoder-shared-query-context-model --block-data-path
        --classes-fraction --data-per-class-fraction --dino-bottleneck-size --dino-freeze-last-layer
        --dino-head-hidden-size --dino-local-crops-number --dino-local-img-size --dino-norm-last-layer
        --dino-teacher-temp --dino-warmup-teacher-temp --dino-warmup-teacher-temp-epochs --embedding-path
        --evidence-data-path --head-lr-mult --ict-head-size --ict-load --img-h --img-w --indexer-batch-size
        --indexer-log-interval --iter-per-epoch --mask-factor --mask-type --no-data-sharding --num-channels
        --num-classes --patch-dim --query-in-block-prob --retriever-report-topk-accuracies
        --retriever-score-scaling --sample-rate --swin-backbone-type --titles-data-path --use-one-sent-docs
        --vision-backbone-type --vision-pretraining --vision-pretraining-type
        """,
    ),  # fmt: skip
    Refused(
        "it belongs to Megatron's BERT and T5, and this trainer builds GPT models",
        """
        --bert-embedder-type --bert-no-binary-head --decoder-num-layers --mask-prob --output-bert-embeddings
        --relative-attention-max-distance --relative-attention-num-buckets --short-seq-prob
        """,
    ),  # fmt: skip
    Refused(
        "it belongs to Megatron's hybrid models with state-space layers, and this trainer builds GPT models",
        """
        --disable-mamba-mem-eff-path --hybrid-layer-pattern --hybrid-override-pattern --is-hybrid-model
        --mamba-head-dim --mamba-inference-conv-states-dtype --mamba-inference-ssm-states-dtype
        --mamba-num-groups --mamba-num-heads --mamba-state-dim --mamba-training-ssm-states-dtype
        --mtp-hybrid-override-pattern
        """,
    ),  # fmt: skip
    Refused(
        "it belongs to Megatron's inference engine, and this trainer generates nothing",
        """
        --decode-only-cuda-graphs --enable-chunked-prefill --inference-batch-times-seqlen-threshold
        --inference-coordinator-port --inference-cuda-graph-all-prefills --inference-cuda-graph-max-tokens
        --inference-cuda-graph-scope --inference-disable-ep-consensus --inference-disable-triton-nvls-kernels
        --inference-dynamic-batching --inference-dynamic-batching-async-sched-mode
        --inference-dynamic-batching-block-size --inference-dynamic-batching-buffer-size-gb
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count
        --inference-dynamic-batching-cuda-graph-sizing-distribution --inference-dynamic-batching-logprobs-mode
        --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-max-requests
        --inference-dynamic-batching-max-tokens --inference-dynamic-batching-num-cuda-graphs
        --inference-dynamic-batching-paused-buffer-size-gb --inference-dynamic-batching-prefix-caching
        --inference-dynamic-batching-prefix-caching-coordinator-policy
        --inference-dynamic-batching-prefix-caching-eviction-policy
        --inference-dynamic-batching-prefix-caching-mamba-gb
        --inference-dynamic-batching-prefix-caching-routing-alpha --inference-dynamic-batching-sampling-backend
        --inference-dynamic-batching-track-generated-token-events
        --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-unified-memory-level --inference-fuse-tp-communication
        --inference-grouped-gemm-backend --inference-logging-step-interval --inference-max-requests
        --inference-max-seq-length --inference-moe-disable-fused-quant-kernels
        --inference-moe-token-dispatcher-type --inference-shards --inference-text-gen-server-logging
        --inference-use-synchronous-zmq-collectives --inference-wandb-logging --max-tokens-to-oom
        --mlp-chunks-for-prefill --moe-enable-routing-replay --moe-pad-experts-for-cuda-graph-inference
        --nccl-all-reduce-for-prefill --num-speculative-tokens --use-legacy-static-engine
        --use-same-sampling-seed-across-dp-ranks
        """,
    ),  # fmt: skip
    Refused(
        "the batch reader knows no packing: use --reset-position-ids and --reset-attention-mask",
        """
        --dataloader-inter-document-masking --hybrid-context-parallel --max-seqlen-per-dp-cp-rank --sft
        --sft-tokenizer-prompt-format
        """,
    ),  # fmt: skip
    Refused(
        "restarts within a process are not part of this entry point: requeue the job (slurm/README.md)",
        """
        --inprocess-active-world-size --inprocess-barrier-timeout --inprocess-completion-timeout
        --inprocess-empty-cuda-cache --inprocess-granularity --inprocess-hard-timeout
        --inprocess-heartbeat-interval --inprocess-heartbeat-timeout --inprocess-last-call-wait
        --inprocess-max-iterations --inprocess-monitor-process-interval --inprocess-monitor-thread-interval
        --inprocess-progress-watchdog-interval --inprocess-restart --inprocess-soft-timeout
        --inprocess-termination-grace-time
        """,
    ),  # fmt: skip
    Refused(
        "Megatron 0.19.2 reads it where a function builds the model, not a configuration as here: drop it",
        """
        --create-all-gather-group --moe-upcycling-granularity --moe-use-upcycling
        --no-use-layer-wise-param-layout
        """,
    ),  # fmt: skip
    Refused("Transformer Engine ignores it from 1.8 on: drop it", "--fp8-interval"),
    Refused("Megatron 0.19.2 reads it nowhere: use --step-batch-size-schedule", "--rampup-batch-size"),
    Refused("Megatron 0.19.2 reads it nowhere: use --attention-backend flash", "--use-flash-attn"),
    Refused("Megatron 0.19.2 fails with it: use --init-method-std", "--init-method-xavier-uniform"),
    Refused(
        "Megatron 0.19.2 reads it nowhere: --exit-signal-handler is for the loading processes too",
        "--exit-signal-handler-for-dataloader",
    ),
    Refused(
        "Megatron 0.19.2 reads it nowhere: drop it",
        """
        --apply-residual-connection-post-layernorm --dist-ckpt-save-pre-mcore-014 --enable-full-sharding-in-hsdp
        --onnx-safe --vocab-extra-ids
        """,
    ),  # fmt: skip
    Refused("this project's flags have no place in Megatron's YAML configuration: give flags", "--yaml-cfg"),
    Refused("Megatron's trainer does not finish the set-up that it puts off: drop it", "--lazy-mpu-init"),
    Refused("Megatron 0.19.2 has --micro-batch-size and --global-batch-size instead", "--batch-size"),
    Refused("Megatron 0.19.2 has --lr-warmup-fraction and --lr-warmup-iters instead", "--warmup"),
    Refused("Megatron 0.19.2 has --tensor-model-parallel-size instead", "--model-parallel-size"),
    Refused(
        "Megatron 0.19.2 has --recompute-activations and --recompute-granularity instead", "--checkpoint-activations"
    ),
)
