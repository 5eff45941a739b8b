# Sourced by the scripts beside it: where things live, and how Debian packages are had.
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Slow to fetch or to build, and safe to delete: jars, tools, CI's build folder.
CACHE=${WHIPPET_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/whippet}
TOOLS=$CACHE/tools

say() { printf '%s\n' "== $*" >&2; }
die() { printf '%s\n' "${0##*/}: $*" >&2; exit 1; }

as_root() { if [ "$EUID" = 0 ]; then "$@"; else sudo "$@"; fi; }

# apt_need PACKAGE..: installs those that are missing; asks the network nothing when none is.
apt_need() {
  local package missing=()
  for package; do
    [[ $(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null) == installed ]] || missing+=("$package")
  done
  [ ${#missing[@]} = 0 ] && return
  say "installing Debian packages: ${missing[*]}"
  # The lists can be old or absent, and they are cheap next to a failed install.
  [ -n "${APT_UPDATED:-}" ] || as_root apt-get update -qq >&2
  APT_UPDATED=1
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >&2
}

# debian_unstable FOLDER PACKAGE [NOT]: fetches a package of Debian's unstable suite with all that it depends on, but
# for those that a pattern names, into a folder. Nothing is installed.
debian_unstable() {
  local into=$1 new=$1.new apt mirror packages
  [ -d "$into" ] && return
  say "fetching $2 into $into"
  rm -rf "$new"
  mkdir -p "$new"/{lists,cache/archives}/partial "$new/debs"
  # Lists of its own, from the mirror that the system uses, signed by the same keys.
  mirror=$(apt-get indextargets 'Created-By: Packages' --format '$(REPO_URI)' | grep -m 1 '/debian/*$') ||
    die "no mirror of Debian among the system's sources"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror unstable main" >"$new/sources.list"
  apt=(-qq -o "Dir::Etc::sourcelist=$new/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::Lists=$new/lists"
    -o "Dir::Cache=$new/cache" -o Dir::State::status=/dev/null -o APT::Sandbox::User=)
  apt-get "${apt[@]}" update >&2
  mapfile -t packages < <(
    apt-cache "${apt[@]}" depends --recurse --no-recommends --no-suggests --no-conflicts --no-breaks --no-replaces \
      --no-enhances "$2" | grep '^[a-z]' | grep -v "^debconf${3:+\\|$3}" | sort -u
  )
  (cd "$new/debs" && apt-get "${apt[@]}" download "${packages[@]}" >&2)
  mv "$new/debs" "$into"
  rm -rf "$new"
}

# tool NAME VERSION: built once, into the cache.
tool() {
  [ -x "$TOOLS/bin/$1" ] && [ "$(cat "$TOOLS/$1.version" 2>/dev/null)" = "$2" ] && return
  mkdir -p "$TOOLS"
  say "building $1 $2 into $TOOLS (once, some minutes)"
  CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
    CARGO_TARGET_DIR="$TOOLS/target" cargo install --quiet --locked --root "$TOOLS" --version "$2" "$1"
  rm -rf "$TOOLS/target"
  echo "$2" >"$TOOLS/$1.version"
}
