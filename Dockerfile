# syntax=docker/dockerfile:1
# Small: one binary with everything but libc linked in; not root.
FROM rust:1.95-bookworm AS build
RUN apt-get update && apt-get install -y --no-install-recommends cmake perl && rm -rf /var/lib/apt/lists/*
WORKDIR /src
# Dependencies first: they change seldom, so this layer is cached.
COPY Cargo.toml Cargo.lock ./
RUN mkdir -p src benches && touch src/lib.rs benches/relay.rs benches/payloads.rs benches/stream.rs && echo 'fn main() {}' > src/main.rs \
 && cargo build --release --locked --features vendored --bin whippet
COPY src src
ARG COMMIT=unknown
RUN touch src/lib.rs src/main.rs \
 && WHIPPET_COMMIT=$COMMIT cargo build --release --locked --features vendored --bin whippet

FROM debian:bookworm-slim
RUN apt-get update && apt-get install -y --no-install-recommends ca-certificates && rm -rf /var/lib/apt/lists/*
COPY --from=build /src/target/release/whippet /usr/local/bin/whippet
USER 65532:65532
EXPOSE 9464
ENTRYPOINT ["/usr/local/bin/whippet"]
CMD ["run", "--config", "/etc/whippet/whippet.yaml"]
