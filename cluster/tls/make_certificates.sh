#!/usr/bin/env bash
# Makes ca.pem, an authority whose key is thrown away, and cert.pem with key.pem, which it signed: what the machines of one cluster show one another.
# usage: bash make_certificates.sh DIRECTORY [DAYS]
set -euo pipefail
umask 077
(($# >= 1)) || { echo "usage: bash $0 DIRECTORY [DAYS]" >&2; exit 2; }
directory=$1 days=${2:-365}
if [[ -e $directory/key.pem ]]; then
  echo "error: $directory/key.pem exists; remove it, or choose another directory" >&2
  exit 2
fi
mkdir -p "$directory"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
curve=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${curve[@]}" -keyout "$scratch/ca.key" -out "$scratch/ca.pem" -days "$days" \
  -subj "/CN=dadvi cluster authority" -addext keyUsage=critical,keyCertSign 2>/dev/null
openssl req "${curve[@]}" -keyout "$scratch/key.pem" -out "$scratch/request.pem" -subj "/CN=dadvi cluster" 2>/dev/null
openssl x509 -req -in "$scratch/request.pem" -CA "$scratch/ca.pem" -CAkey "$scratch/ca.key" -CAcreateserial -out "$scratch/cert.pem" -days "$days" \
  -extfile <(printf 'basicConstraints=CA:FALSE\nsubjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n') 2>/dev/null
mv "$scratch/ca.pem" "$scratch/cert.pem" "$scratch/key.pem" "$directory"
