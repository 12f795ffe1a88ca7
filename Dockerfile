# The image in which the notebooks run on a cluster (profiles/kubernetes) or anywhere else:
#
#   docker build -t medaug:0.1.0 .
#   docker run --rm -v "$PWD/runs:/opt/medaug/runs" medaug:0.1.0 make report
#
# The packages are those of requirements.txt. Quarto is optional: without it the report is the nbconvert site.
#   --build-arg QUARTO_DEB=quarto-linux-amd64.deb   a release file of Quarto that lies beside this Dockerfile
#   --build-arg WHEELS=wheels                       a folder with wheels beside it, for building and running without a network
FROM python:3.11-slim

ARG QUARTO_DEB=""
ARG WHEELS=""
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 MEDAUG_ROOT=/opt/medaug
# empty values are ignored by pip
ENV PIP_NO_INDEX=${WHEELS:+1} PIP_FIND_LINKS=${WHEELS:+/opt/medaug/$WHEELS}

RUN apt-get update && apt-get install -y --no-install-recommends git make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 medaug && mkdir -p /opt/medaug && chown medaug /opt/medaug
WORKDIR /opt/medaug

COPY --chown=medaug . .
RUN if [ -n "$QUARTO_DEB" ]; then dpkg --install "$QUARTO_DEB"; fi

USER medaug
RUN make env
ENV PATH=/opt/medaug/.venv/bin:$PATH
CMD ["make", "help"]
