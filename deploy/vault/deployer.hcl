# Who starts brokers: may mint secret_ids of one role, and only wrapped, so that whoever unwraps one is its first reader.
#
# `approle` and `credbroker` are the mount and the name of the broker's role. The role bounds what a secret_id may do.

path "auth/approle/role/credbroker/secret-id" {
  capabilities     = ["update"]
  min_wrapping_ttl = "30s"
  max_wrapping_ttl = "5m"
}
