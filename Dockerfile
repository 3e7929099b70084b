# On a CPU:     docker build -t crysldnet .
# On GPUs:      docker build -t crysldnet --build-arg BASE=pytorch/pytorch:2.9.0-cuda12.8-cudnn9-runtime .
# To run it:    docker run --rm -v "$PWD:/work" crysldnet finetune cifs values.csv        (GPUs: --gpus all)
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE CITATION.cff constraints.txt /source/
COPY conf /source/conf
COPY src /source/src
# A base that brings torch keeps its build; others get the one for CPUs.
RUN cd /source \
 && { python -c "import torch" 2>/dev/null || pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"; } \
 && grep -v '^torch==' constraints.txt > /tmp/versions.txt \
 && pip install --no-cache-dir -c /tmp/versions.txt ".[formats,excel,sweep]" \
 && rm -rf /source /tmp/versions.txt
WORKDIR /work
ENTRYPOINT ["crysldnet"]
CMD ["--help"]
