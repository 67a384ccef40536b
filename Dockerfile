# Two images from one file: `api` answers HTTP and has no torch; `worker` runs the model on CPU or, given a GPU, on CUDA.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS base
ENV PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 JUDGE_CACHE_DIR=/models
RUN useradd --create-home --uid 1000 judge && mkdir /models && chown judge /models
WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY constraints constraints

FROM base AS api
COPY client client
COPY service service
COPY trainer trainer
RUN pip install -c constraints/base.txt '.[service]'
USER judge
WORKDIR /home/judge
VOLUME /models
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=2)"]
ENTRYPOINT ["python", "-m", "service"]
CMD ["--host", "0.0.0.0", "--log-format", "json"]

FROM base AS worker
# Alone and by its pin, so that this layer is kept while the code changes.
RUN pip install "$(grep '^torch==' constraints/base.txt)"
COPY client client
COPY service service
COPY trainer trainer
RUN pip install -c constraints/base.txt '.[service,torch]'
USER judge
WORKDIR /home/judge
VOLUME /models
EXPOSE 9100
HEALTHCHECK --interval=10s --timeout=3s --start-period=600s \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9100/metrics', timeout=2)"]
ENTRYPOINT ["python", "-m", "service.worker"]
CMD ["--log-format", "json", "--metrics-host", "0.0.0.0", "--metrics-port", "9100"]
