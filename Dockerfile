# Serves a disk image as a file that other containers and the host can use, and moves it.
#
#   docker build -t fusemig .
#   docker run --detach --name vda --init --stop-timeout 30 --publish 4444:4444 \
#       --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined \
#       --mount type=bind,source=/srv/disks,target=/disks,bind-propagation=rshared \
#       --mount type=bind,source=/srv/pki,target=/pki,readonly \
#       fusemig serve /disks/mnt --disk vda=/disks/images/vda.img --control /disks/control --allow-other
#
# /srv/disks/mnt/vda is then the disk on the host; /srv/disks must lie on a mount that is shared
# (findmnt -o TARGET,PROPAGATION). The host that receives adds
#       --incoming tcp:0.0.0.0:4444 --tls-creds /pki --tls-authz IDENTITY
# with /srv/pki as in docs/security.md, and the one that has the disk sends it:
#   docker exec vda fusemig migrate /disks/control tcp:OTHER-HOST:4444 --tls-creds /pki
#
# docs/recipes.md has all of it step by step, and tests/release/test_container.py runs that.

# Debian's own Python, so that interpreter, libfuse and what they need get their security fixes from one place.
FROM debian:bookworm-slim AS build
# The release of Debian pins the packages; a fixed version leaves its mirrors with the next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev libfuse3-dev pkg-config python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fusemig fusemig
RUN python3 -m venv /opt/fusemig \
    && /opt/fusemig/bin/pip install --no-cache-dir . \
    && /opt/fusemig/bin/pip uninstall --yes pip setuptools

FROM debian:bookworm-slim
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends fuse3 python3 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/fusemig /opt/fusemig
ENV PATH=/opt/fusemig/bin:$PATH
# SIGTERM unmounts in order; a committed hand-off may take its deadlines to end.
STOPSIGNAL SIGTERM
ENTRYPOINT ["fusemig"]
CMD ["--help"]
