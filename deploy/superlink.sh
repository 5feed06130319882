#!/bin/sh
# Start the SuperLink, over TLS and with node authentication. What stands behind is handed on to flower-superlink.
#
#   LISTEN=0.0.0.0:8000   address and port, for nodes and administration alike
#   CERTS=certs           folder with ca.crt, server.crt and server.key (make_certs.sh)
#   STATE=state           folder for the database and the app's code; guard it like the model
set -eu

listen=${LISTEN:-0.0.0.0:8000} certs=${CERTS:-certs} state=${STATE:-state}
mkdir -p "$state"
state=$(realpath "$state")
export FLWR_HOME="$state/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink --host "${listen%:*}" --port "${listen##*:}" --enable-supernode-auth \
    --ssl-ca-certfile "$certs/ca.crt" --ssl-certfile "$certs/server.crt" --ssl-keyfile "$certs/server.key" \
    --disable-runtime-dependency-installation --database "$state/superlink.db" "$@"
