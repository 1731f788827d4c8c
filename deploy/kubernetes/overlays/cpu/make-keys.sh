#!/bin/sh
# Make the keys of a try-out, once, in keys/ beside this file.
set -eu
umask 077
cd "$(dirname "$0")"
mkdir keys
random() { openssl rand -hex 24 | tr -d '\n'; }
random > keys/redis-password
random > keys/postgres-password
access_key=$(random)
secret_key=$(random)
cat > keys/s3.json <<JSON
{"identities": [{"name": "root", "credentials": [{"accessKey": "$access_key", "secretKey": "$secret_key"}],
  "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
JSON
cat > keys/settings.json <<JSON
{
  "database_url": "postgresql+psycopg://postgres:$(cat keys/postgres-password)@postgres/postgres",
  "secret_key": "$(openssl rand -base64 32 | tr '+/' '-_')",
  "jwt_secret": "$(random)",
  "storage_access_key_id": "$access_key",
  "storage_secret_access_key": "$secret_key"
}
JSON
