#!/bin/sh
# Makes compose/.env with random secrets; one that is there is left alone.
set -eu
cd "$(dirname "$0")/.."
if [ -e .env ]; then
    echo "compose/.env is there already"
    exit 0
fi
secret() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
umask 077
sed -e "s/^POSTGRES_PASSWORD=$/POSTGRES_PASSWORD=$(secret)/" \
    -e "s/^RABBITMQ_PASSWORD=$/RABBITMQ_PASSWORD=$(secret)/" \
    -e "s/^REDIS_PASSWORD=$/REDIS_PASSWORD=$(secret)/" \
    -e "s/^RABBITMQ_COOKIE=$/RABBITMQ_COOKIE=$(secret)/" \
    -e "s/^ELASTIC_PASSWORD=$/ELASTIC_PASSWORD=$(secret)/" \
    -e "s/^KIBANA_PASSWORD=$/KIBANA_PASSWORD=$(secret)/" \
    -e "s/^KIBANA_KEY=$/KIBANA_KEY=$(secret)/" .env.example > .env
echo "made compose/.env"
