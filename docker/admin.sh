#!/bin/sh
# What the containers `register` and `submit` do.
#
#   admin.sh register            make the public keys in /keys known to the SuperLink; known ones stay
#   admin.sh submit KEY=VALUE... submit a run, show its progress, and fail when it failed
set -eu
mkdir -p "$FLWR_HOME"
cp /config/superlink.toml "$FLWR_HOME/config.toml"

task=$1
shift
case $task in
    register)
        for key in /keys/*.pub; do
            name=$(basename "$key" .pub)
            if answer=$(flwr supernode register "$key" site --name "$name" 2>&1); then
                echo "$name: registered"
            else
                case $answer in
                    *"already in use"*) echo "$name: registered before" ;;
                    *) echo "$answer" >&2; exit 1 ;;
                esac
            fi
        done
        ;;
    submit)
        # `flwr run site --stream`, which alone exits 0 after a failure too
        exec fedbt run --superlink site --config /config/run.toml "$@"
        ;;
    *)
        exec "$task" "$@" # any other command, such as: flwr ls site
        ;;
esac
