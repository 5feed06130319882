#!/bin/sh
# Administer a federation: register nodes, submit a run, watch it, stop it.
#
#   deploy/admin.sh register KEY.pub...      let nodes in; a key that is known already stays
#   deploy/admin.sh nodes                    list the nodes: online or offline, since when
#   deploy/admin.sh submit [KEY=VALUE...]    submit a run, show its progress, exit 1 when it failed
#   deploy/admin.sh runs                     list the runs with their ids
#   deploy/admin.sh watch ID                 show a run's log
#   deploy/admin.sh stop ID                  stop a run
#
#   SUPERLINK=fedbt.example.org:8000
#   CERTS=certs      folder with ca.crt
#   STATE=state      folder for Flower's configuration
set -eu

here=$(cd "$(dirname "$0")" && pwd)
certs=$(cd "${CERTS:-certs}" && pwd)
export FLWR_HOME="${STATE:-state}/flwr" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
mkdir -p "$FLWR_HOME"
FLWR_HOME=$(cd "$FLWR_HOME" && pwd)
cat > "$FLWR_HOME/config.toml" <<END
[superlink]
default = "site"

[superlink.site]
address = "${SUPERLINK:?set SUPERLINK=host:port}"
root-certificates = "$certs/ca.crt"
END

task=${1:?usage: admin.sh register|nodes|submit|runs|watch|stop, see the head of this file}
shift
case $task in
    register)
        for key in "$@"; do
            name=$(basename "$key" .pub)
            if answer=$(flwr supernode register "$key" site --name "$name" 2>&1); then
                echo "$name: registered"
            else
                case $answer in
                    *"already in use"*) echo "$name: registered before" ;;
                    *) echo "$name: not registered: $answer" >&2; exit 1 ;;
                esac
            fi
        done
        ;;
    nodes) exec flwr supernode list site ;;
    submit) exec fedbt run --superlink site "$@" ;;
    runs) exec flwr ls site "$@" ;;
    watch) cd "$here/.." && exec flwr log "$@" site --stream ;;
    stop) cd "$here/.." && exec flwr stop "$@" site ;;
    *) echo "admin.sh: '$task' is no task: register, nodes, submit, runs, watch or stop" >&2; exit 1 ;;
esac
