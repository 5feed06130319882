#!/bin/sh
# Start the SuperNode of a site. What stands behind NAME is handed on to flower-supernode.
#
#   deploy/supernode.sh NAME [FLAG...]
#   SUPERLINK=fedbt.example.org:8000
#   CERTS=certs      folder with ca.crt and the node's private key NAME (make_certs.sh)
#   DATA=data        the site's rows: a file, or a folder with train.jsonl (.json .csv .parquet .txt, also .gz)
#   STATE=state      folder for pools, the cache (the site's data in another form: guard it) and the app's code
#   SETTINGS=        more node settings, such as: device='cuda' local-depth=3 model-path='/models/bert'
set -eu

name=${1:?usage: supernode.sh NAME, the name of this site}
shift
certs=${CERTS:-certs} state=${STATE:-state}
mkdir -p "$state"
state=$(realpath "$state") data=$(realpath -m "${DATA:-data}")
export FLWR_HOME="$state/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1

quoted() { # KEY VALUE: as Flower reads node settings, in quotes that the value does not hold
    case $2 in
        *[\"\\]*\'* | *\'*[\"\\]*)
            echo "supernode.sh: error: $1 '$2' holds an apostrophe and a \" or \\: use a path with one kind" >&2
            return 1
            ;;
        *\'*) printf '%s="%s"' "$1" "$2" ;;
        *) printf "%s='%s'" "$1" "$2" ;;
    esac
}
name_setting=$(quoted name "$name")
data_setting=$(quoted data-path "$data")
pool_setting=$(quoted pool-dir "$state/pools")
cache_setting=$(quoted cache-dir "$state/cache")
node="$name_setting $data_setting $pool_setting $cache_setting"
exec flower-supernode --superlink "${SUPERLINK:?set SUPERLINK=host:port}" --root-certificates "$certs/ca.crt" \
    --auth-supernode-private-key "$certs/$name" --node-config "$node ${SETTINGS:-}" "$@"
