# vlm_tune on NVIDIA GPUs. This file was not built where it was written, which has neither Docker nor a GPU:
# the image's tag and the package's ranges are checked by tests/test_versions.py, and no more.
#   docker build -t vlm_tune .
#   docker run --rm --gpus all --ipc host -v "$PWD:/work" vlm_tune sft recipe.yaml
# `--ipc host`: loader workers and NCCL pass tensors through shared memory, of which a container has 64 MB.
# The `devel` image, since the kernels for CPUs, Triton and DeepSpeed's optimizers are compiled when they are needed.
ARG BASE=pytorch/pytorch:2.11.0-cuda13.0-cudnn9-devel
FROM ${BASE}
ENV PIP_NO_CACHE_DIR=1 PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /opt/vlm_tune
COPY pyproject.toml README.md LICENSE ./
COPY vlm_tune vlm_tune
COPY recipes recipes
COPY data_templates data_templates
# torch and what belongs to it stay those of the image, which fit its CUDA.
RUN pip freeze | grep -E '^(torch|torchvision|triton|nvidia)' | grep -v ' @ ' > /tmp/constraints.txt \
 && pip install --constraint /tmp/constraints.txt . \
 && vlm-tune env
# Compiled parts, features and prepared rows; mount a folder here to keep them.
ENV VLM_TUNE_CACHE=/cache
RUN mkdir --mode 0700 /cache
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["vlm-tune"]
CMD ["env"]
