# syntax=docker/dockerfile:1
# Serves a disk image as a file that other containers and the host can use, and moves it.
#
#   docker build -t fusemig .
#   docker run --rm --init --name vda-source \
#       --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined \
#       --mount type=bind,source=/srv/disks,target=/disks,bind-propagation=rshared \
#       fusemig serve /disks/mnt --disk vda=/disks/images/vda.img --control /disks/control --allow-other
#
# /srv/disks/mnt/vda is then the disk on the host; /srv/disks must lie on a mount that is shared
# (findmnt -o TARGET,PROPAGATION). To receive, publish a port, mount a directory of credentials (docs/security.md) and add
#       --incoming tcp:0.0.0.0:4444 --tls-creds /pki --tls-authz IDENTITY
# To migrate: docker exec vda-source fusemig migrate /disks/control tcp:OTHER-HOST:4444 --tls-creds /pki

FROM python:3.12-slim-bookworm AS build
# The release of Debian pins the packages; a fixed version leaves its mirrors with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config \
    && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/fusemig
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fusemig fusemig
RUN /opt/fusemig/bin/pip install --no-cache-dir .

FROM python:3.12-slim-bookworm
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends fuse3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/fusemig /opt/fusemig
ENV PATH=/opt/fusemig/bin:$PATH
# SIGTERM unmounts in order; a committed hand-off may take its deadlines to end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["fusemig"]
CMD ["--help"]
