#!/usr/bin/env bash
# Runs a command. At SIGTERM it passes the signal on, waits for the command, and exits with 143.
#
#     bash launch/restartable.sh python -m richhf_jax.train --gin_file=...
#
# At SIGTERM, training saves a checkpoint and exits with 0. A scheduler would take 0 for the end of the training,
# and not start it again on other machines. From 143 it knows that the training was stopped.
set -euo pipefail

told=
status=0
"$@" &
child=$!
trap 'told=yes; kill -TERM "$child" 2>/dev/null || true' TERM
trap : INT # A terminal's Ctrl-C reaches the command, too.
wait "$child" || status=$?
# A signal ends `wait` before the command has ended.
while kill -0 "$child" 2>/dev/null; do
  status=0
  wait "$child" || status=$?
done
[[ -z $told ]] || status=143
exit "$status"
