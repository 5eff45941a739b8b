# `just` is a convenience: every recipe is a script or one command that CI uses as it stands.

# The whole story with nothing to install.
demo *arguments:
    scripts/demo {{arguments}}

# Format, lints, licences, docs and all tests.
test *arguments:
    scripts/test {{arguments}}

# Tests that need no services.
unit:
    cargo test --lib

# What CI runs.
ci:
    .ci/run

# Start, stop or look at the services: just services up
services *arguments:
    scripts/services {{arguments}}

# The relay against its bounds.
bench rounds="5":
    scripts/bench {{rounds}}

fmt:
    cargo fmt

lint:
    cargo clippy --all-targets -- -D warnings
