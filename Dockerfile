# syntax=docker/dockerfile:1
# xlane for NVIDIA GPUs; `--build-arg EXTRA=tpu` for TPUs, `--build-arg EXTRA=` for CPUs. Port, volume and variables are those
# of Text Generation Inference's image. CUDA comes in Python wheels: of the host only its driver is needed.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
ARG EXTRA=cuda
RUN python -m venv /opt/xlane
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY engine engine
COPY models models
COPY server server
COPY sharding sharding
COPY tpu tpu
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/xlane/bin/pip install --require-hashes --requirement "tpu/requirements-${EXTRA:-cpu}.lock" && \
    /opt/xlane/bin/pip install --no-deps --no-build-isolation .

FROM python:${PYTHON}-slim-bookworm
# The group is root's, as on platforms that choose the user: whoever it is may write to the volume.
RUN useradd --uid 1000 --gid 0 --no-create-home xlane && install --directory --owner=1000 --group=0 --mode=0775 /data
COPY --from=build /opt/xlane /opt/xlane
# Inside a container every address has to be listened on; who reaches the port is said where it is published.
ENV PATH=/opt/xlane/bin:$PATH \
    HOME=/data \
    HF_HOME=/data \
    XLANE_CACHE_DIR=/data/xlane \
    PORT=80 \
    XLANE_INSECURE=true \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONDONTWRITEBYTECODE=1
USER 1000
WORKDIR /data
VOLUME /data
EXPOSE 80
# Loading a large model and compiling its first programs takes minutes, and a server that loads is not ill.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['PORT']), timeout=4); c.request('GET', '/health'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["text-generation-launcher"]
