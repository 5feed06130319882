#!/bin/sh
# A whole federation on this machine, over TLS and with node authentication: makes certificates, keys and sample data,
# starts a SuperLink and three SuperNodes, submits a run of 3 rounds, checks the report, ends everything it started.
# Fails with one line, and the end of the log that says why.
#
#   deploy/demo.sh [FOLDER]     default: runs/deploy-demo
#   PORT=18100                  of the SuperLink; the nodes take the three after it
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
if [ -d "$root/.venv/bin" ]; then PATH=$root/.venv/bin:$PATH; fi
folder=${1:-$root/runs/deploy-demo}
port=${PORT:-18100}
sites="hospital-a hospital-b hospital-c"
pids=""

stop() {
    for pid in $pids; do kill "$pid" 2> /dev/null || true; done
    for pid in $pids; do wait "$pid" 2> /dev/null || true; done
}
trap stop EXIT
trap 'exit 130' INT TERM

fail() { # MESSAGE [LOG]
    echo "demo: error: $1" >&2
    [ $# -lt 2 ] || tail -n 20 "$2" >&2
    exit 1
}

for tool in openssl ssh-keygen flower-superlink fedbt; do
    command -v $tool > /dev/null || fail "$tool is missing: install it (make env for the Python side)"
done
rm -rf "$folder"
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export CERTS="$folder/certs" SUPERLINK="127.0.0.1:$port" OMP_NUM_THREADS=1

echo "demo: certificates and keys"
# shellcheck disable=SC2086  # the names are words
"$here/make_certs.sh" $sites
echo "demo: sample data"
python "$here/make_sample_data.py" --rows 120 "$folder/data"

echo "demo: the SuperLink on $SUPERLINK"
STATE=$folder/superlink LISTEN=$SUPERLINK "$here/superlink.sh" > "$folder/superlink.log" 2>&1 &
link=$!
pids=$link
tries=0
until openssl s_client -connect "$SUPERLINK" -CAfile "$CERTS/ca.crt" -verify_return_error < /dev/null > /dev/null 2>&1; do
    tries=$((tries + 1))
    kill -0 "$link" 2> /dev/null || fail "the SuperLink ended" "$folder/superlink.log"
    [ $tries -lt 120 ] || fail "the SuperLink does not answer on $SUPERLINK" "$folder/superlink.log"
    sleep 1
done

export STATE="$folder/admin"
for site in $sites; do
    "$here/admin.sh" register "$CERTS/$site.pub"
    port=$((port + 1))
    STATE=$folder/$site DATA=$folder/data/$site "$here/supernode.sh" "$site" --port $port > "$folder/$site.log" 2>&1 &
    pids="$pids $!"
done

echo "demo: a run of 3 rounds"
"$here/admin.sh" submit task=classification num-rounds=3 min-clients=3 max-length=32 round-timeout=600 \
    "dataset=$folder/data/server" "output-dir=$folder/output" || fail "the run failed" "$folder/superlink.log"
python - "$folder/output" <<'END' || fail "the run left no good report in $folder/output"
import sys
from fedbt_app.report import report
result = report.load(sys.argv[1])
counts = [one["clients"] for one in result["rounds"]]
assert counts == [3, 3, 3] and not result["refused"], f"clients by round {counts}, refused {result['refused']}"
END
[ -f "$folder/output/model/model.safetensors" ] || fail "the run left no model in $folder/output/model"
echo "demo: 3 rounds by 3 nodes; the report is $folder/output/report.md, the model $folder/output/model"
