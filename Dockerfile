# Five images from one file: `api` answers HTTP and has no torch; `worker-cpu` and `worker-gpu` run the model; `trainer`
# makes a model better; `bench` measures a judge. `docker build --target api .`, or deploy/build_images.sh for all.
#
# Any base with Python 3.11 or newer, its venv module and CA certificates does; pin it by digest where that matters:
# --build-arg BASE=python:3.11.14-slim-bookworm@sha256:…
ARG BASE=python:3.11.14-slim-bookworm
# Which torch the trainer gets: cuda (what PyPI has for Linux), or cpu.
ARG TRAINER_TORCH=cuda

# What every build stage starts with. pyproject.toml without the code beside it names the dependencies alone, so the layers
# that install them are kept while the code changes.
FROM ${BASE} AS build
ENV PATH=/opt/venv/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv \
 && echo /opt/judge > "$(/opt/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/judge.pth"
WORKDIR /src
COPY pyproject.toml constraints/base.txt ./
RUN touch README.md LICENSE

FROM build AS api-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c base.txt '.[service,otel]' && pip uninstall --yes judge-as-api setuptools pip

FROM build AS bench-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c base.txt '.[benchmarks,hub]' && pip uninstall --yes judge-as-api setuptools pip

# torch alone, by its pin: the largest layer and the one that changes least. PyPI's build for Linux carries CUDA; the CPU
# build is a fifth of that and comes from PyTorch's own index (an empty TORCH_CPU_INDEX: whatever pip finds).
FROM build AS torch-cpu
ARG TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install ${TORCH_CPU_INDEX:+--extra-index-url "$TORCH_CPU_INDEX"} "$(grep '^torch==' base.txt)"

FROM build AS torch-cuda
RUN --mount=type=cache,target=/root/.cache/pip pip install "$(grep '^torch==' base.txt)"

# These keep pip: `python -m service.models fetch` downloads with it.
FROM torch-cpu AS worker-cpu-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c base.txt '.[service,otel,torch]' && pip uninstall --yes judge-as-api

# Has both engines, torch and vllm, on the versions that vLLM wants.
FROM build AS worker-gpu-deps
COPY constraints/vllm.txt ./
RUN --mount=type=cache,target=/root/.cache/pip pip install "$(grep '^torch==' vllm.txt)"
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c vllm.txt '.[service,otel,torch,vllm]' && pip uninstall --yes judge-as-api

FROM torch-${TRAINER_TORCH} AS trainer-deps
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install -c base.txt '.[service,torch,trainer]' && pip uninstall --yes judge-as-api

FROM build AS code
COPY README.md LICENSE ./
COPY client client
COPY service service
COPY trainer trainer
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --target /opt/judge .

# The kernels of the torch engine, which are otherwise compiled at their first use.
FROM worker-cpu-deps AS native
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY --from=code /opt/judge /opt/judge
RUN JUDGE_NATIVE_DIR=/opt/native python -m service.engine.torch.cpu.kernel

# What every image ends with: a user without rights, and nothing to be written outside /tmp, /models and /runs, so that the
# root file system can be read-only. HOME is /tmp because libraries keep caches there. What Hugging Face's libraries
# would say, bars and advice, has no place between the JSON lines of the log.
FROM ${BASE} AS run
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp \
    JUDGE_CACHE_DIR=/models HF_HOME=/models/hf HF_HUB_DISABLE_PROGRESS_BARS=1 TRANSFORMERS_NO_ADVISORY_WARNINGS=1
RUN useradd --uid 1000 --no-create-home --home-dir /tmp judge \
 && install --directory --owner=judge --group=judge /models /runs \
 && install --directory /app
# Empty, and nobody's to write to: `python -m` looks for modules in the current folder first.
WORKDIR /app

FROM run AS api
COPY --from=api-deps /opt/venv /opt/venv
COPY --from=code /opt/judge /opt/judge
USER judge
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["--host", "0.0.0.0", "--log-format", "json"]

# What the two workers have in common.
FROM run AS worker
ENV JUDGE_NATIVE_DIR=/opt/native
VOLUME /models
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=5s --start-period=600s \
  CMD ["python", "-c", "import urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:9100/metrics', timeout=4)"]
ENTRYPOINT ["python", "-m", "service.worker"]
CMD ["--log-format", "json", "--metrics-host", "0.0.0.0", "--metrics-port", "9100"]

FROM worker AS worker-cpu
COPY --from=native /opt/native /opt/native
COPY --from=worker-cpu-deps /opt/venv /opt/venv
COPY --from=code /opt/judge /opt/judge
USER judge

FROM worker AS worker-gpu
# vLLM's kernels are put together by a C compiler when they are first used.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY --from=worker-gpu-deps /opt/venv /opt/venv
COPY --from=code /opt/judge /opt/judge
USER judge

# A run ends by itself: there is nothing to check but that it is there.
FROM run AS trainer
COPY --from=trainer-deps /opt/venv /opt/venv
COPY --from=code /opt/judge /opt/judge
USER judge
VOLUME /models /runs
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "trainer.self_improve"]
CMD ["--help"]

FROM run AS bench
COPY --from=bench-deps /opt/venv /opt/venv
COPY --from=code /opt/judge /opt/judge
USER judge
VOLUME /runs
HEALTHCHECK NONE
ENTRYPOINT ["python", "-m", "client"]
CMD ["--help"]
