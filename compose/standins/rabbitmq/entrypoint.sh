#!/bin/sh
# RABBITMQ_DEFAULT_USER and RABBITMQ_DEFAULT_PASS, as the official image has them.
set -eu
mkdir -p /etc/rabbitmq/conf.d /var/lib/rabbitmq /var/log/rabbitmq
printf 'default_user = %s\ndefault_pass = %s\nloopback_users = none\nlog.console = true\n' \
    "$RABBITMQ_DEFAULT_USER" "$RABBITMQ_DEFAULT_PASS" > /etc/rabbitmq/conf.d/10-defaults.conf
chown -R rabbitmq /var/lib/rabbitmq /var/log/rabbitmq
exec rabbitmq-server
