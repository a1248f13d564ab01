# For admins, who register, rotate, disable and revoke keys: may write keys of every account of one environment, but read no secret.
#
# `kv` and `kucoin/prod` are `vault.mount` and `vault.prefix` of the broker's configuration; change them in both places.
# Deliberately not granted: `read` below `data/`, and everything irreversible (`destroy`, `delete` below `metadata/`).
# Not prevented: with `max_versions=1` in the metadata of a key, the next write prunes its old versions.

path "kv/data/kucoin/prod/*"     { capabilities = ["create", "update"] }
path "kv/metadata/kucoin/prod/*" { capabilities = ["create", "list", "read", "update"] }
path "kv/delete/kucoin/prod/*"   { capabilities = ["update"] }
path "kv/undelete/kucoin/prod/*" { capabilities = ["update"] }
