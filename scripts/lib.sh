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
