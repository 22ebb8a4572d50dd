# Prepared, not run: no image has been built from this file yet.
#
#   docker build -t gesso .                                          # CPU
#   docker build -t gesso:cuda --build-arg TORCH=cu128 .             # NVIDIA GPUs
#   docker run --rm -v "$PWD/runs:/work/runs" gesso train digits train.total_images=20k
#   docker run --rm --gpus all -v "$PWD:/work" gesso:cuda train folder:photos
#   docker run --rm -p 127.0.0.1:7860:7860 -v "$PWD/runs:/work/runs" gesso play runs/digits --host 0.0.0.0
FROM python:3.12-slim

# Index of PyTorch's wheels: cpu, or the CUDA version that the driver supports. CUDA's libraries come with the wheel.
ARG TORCH=cpu
# Extras; gradio (play) needs an older pillow than constraints.txt has.
ARG EXTRAS=demo,vae,text,plots,parquet,log,hub,s3,play

WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY gesso ./gesso
RUN grep -v '^pillow==' constraints.txt > /tmp/constraints.txt \
    && TORCH_VERSION="$(sed -n 's/^torch==//p' constraints.txt)" \
    && pip install --no-cache-dir "torch==${TORCH_VERSION}" --index-url "https://download.pytorch.org/whl/${TORCH}" \
    && pip install --no-cache-dir -c /tmp/constraints.txt ".[${EXTRAS}]"

# A user of its own: nothing runs as root.
RUN useradd --create-home --uid 1000 gesso && mkdir /work && chown gesso /work
USER gesso
WORKDIR /work
ENTRYPOINT ["gesso"]
CMD ["--help"]
