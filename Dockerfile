# syntax=docker/dockerfile:1
# Nothing in it but the program, what it is linked with, and whom to trust: no shell, no package manager, not root.
# The base is pinned by tag here; whoever builds for production pins it by digest too:
#   docker build --build-arg BUILDER=rust:1.95-bookworm@sha256:… --build-arg COMMIT=$(git rev-parse HEAD) .
# `scripts/image test` runs the same commands without an engine.
ARG BUILDER=rust:1.95-bookworm
FROM ${BUILDER} AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake perl python3 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY scripts/lib.sh scripts/image scripts/sbom.py scripts/
# Dependencies first: they change seldom, so this layer is cached.
COPY Cargo.toml Cargo.lock ./
RUN scripts/image skeleton . && scripts/image build
COPY src src
COPY docs/openapi.yaml docs/
ARG COMMIT=unknown
RUN touch src/lib.rs src/main.rs && WHIPPET_COMMIT=$COMMIT scripts/image build
RUN scripts/image root target/release/whippet /image

FROM scratch
COPY --from=build /image /
USER 65532:65532
EXPOSE 9464
ENTRYPOINT ["/usr/local/bin/whippet"]
CMD ["run", "--config", "/etc/whippet/whippet.yaml"]
