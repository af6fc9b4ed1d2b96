# The command `cpcl` in a container.
#   docker build -t cpcl .                                    # for processors
#   docker build -t cpcl:cuda --build-arg DEVICE=cuda .       # with CUDA's libraries
#   docker run --rm -v "$PWD:/work" cpcl index crops --run run --out index
#   docker run --rm --gpus all -v "$PWD:/work" cpcl:cuda train --root my-crops --out run
FROM python:3.12-slim
ARG DEVICE=cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# what changes rarely comes first, so that another build does not install it again
COPY requirements-cpu.txt /src/
# the newest torch and the newest torchvision belong together
# hadolint ignore=DL3013
RUN if [ "$DEVICE" = cpu ]; then \
        pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu && \
        pip install -r /src/requirements-cpu.txt; \
    fi

COPY settings.ini setup.py pyproject.toml MANIFEST.in README.md LICENSE /src/
COPY cpcl /src/cpcl
COPY data/tiny-clip /src/data/tiny-clip
RUN if [ "$DEVICE" = cpu ]; then pip install --no-deps /src; else pip install '/src[app]'; fi && rm -r /src

# nobody's files are root's: `docker run --user "$(id -u):$(id -g)"` writes yours
RUN useradd --create-home --uid 1000 cpcl && mkdir -m 777 /cache
ENV XDG_CACHE_HOME=/cache MPLCONFIGDIR=/cache
USER 1000
WORKDIR /work
ENTRYPOINT ["cpcl"]
CMD ["--help"]
