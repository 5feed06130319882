#!/bin/sh
# Make what TLS and node authentication need, for trying FedBT out: a certificate authority, the SuperLink's
# certificate, and one key pair a node. What is there already is kept; the SuperLink's certificate is issued
# again when it lacks a name or ends within 30 days.
#
#   deploy/make_certs.sh [NODE...]                names of the nodes that get a key pair
#   CERTS=DIR                                     where to; default: certs
#   SERVER_NAMES=fedbt.example.org,203.0.113.7    names and addresses under which nodes reach the SuperLink
#
# Between real sites every site makes its own node key and hands out only the .pub file: docs/deployment.md.
set -eu
umask 077

certs=${CERTS:-certs}
names=${SERVER_NAMES:-localhost,127.0.0.1}

mkdir -p "$certs"
cd "$certs"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

new_key() { # FILE; written aside first, so that a cut-off run leaves no half key
    openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-384 -out "$scratch/key"
    mv "$scratch/key" "$1"
}

if [ ! -f ca.crt ]; then
    [ -f ca.key ] || new_key ca.key
    cat > "$scratch/ca.cnf" <<END
[req]
prompt = no
distinguished_name = name
x509_extensions = extensions
[name]
CN = FedBT CA
[extensions]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
END
    openssl req -new -x509 -sha384 -days 1825 -config "$scratch/ca.cnf" -key ca.key -out "$scratch/ca.crt"
    mv "$scratch/ca.crt" ca.crt
    echo "made the certificate authority ca.crt; ca.key belongs on no SuperLink and on no node"
fi

alternatives=""
for name in $(printf %s "$names" | tr ',' ' '); do
    case $name in
        *:* | [0-9]*.[0-9]*.[0-9]*.[0-9]*) kind=IP ;;
        *) kind=DNS ;;
    esac
    alternatives="${alternatives:+$alternatives,}$kind:$name"
done

current=""
if [ -f server.crt ] && openssl x509 -in server.crt -noout -checkend 2592000 > /dev/null &&
    openssl verify -CAfile ca.crt server.crt > /dev/null 2>&1 && [ -f server.names ]; then
    current=$(cat server.names)
fi
if [ "$current" != "$alternatives" ]; then
    [ -f server.key ] || new_key server.key
    cat > "$scratch/server.ext" <<END
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = $alternatives
END
    openssl req -new -sha384 -key server.key -subj "/CN=FedBT SuperLink" -out "$scratch/server.csr"
    openssl x509 -req -sha384 -days 397 -in "$scratch/server.csr" -CA ca.crt -CAkey ca.key \
        -set_serial "0x$(openssl rand -hex 16)" -extfile "$scratch/server.ext" -out "$scratch/server.crt" 2> /dev/null
    mv "$scratch/server.crt" server.crt
    printf %s "$alternatives" > server.names
    echo "issued server.crt for $alternatives"
fi

for node in "$@"; do
    case $node in
        "" | *[!A-Za-z0-9_-]*) echo "node name '$node': use letters, digits, - and _ only" >&2; exit 1 ;;
    esac
    if [ ! -f "$node" ]; then
        ssh-keygen -q -t ecdsa -b 384 -N "" -C "$node" -f "$node"
        echo "made the key of $node"
    fi
done

chmod 700 .
chmod 600 ./*
chmod 644 ./*.crt
for file in ./*.pub; do [ ! -e "$file" ] || chmod 644 "$file"; done
