#!/usr/bin/env bash
# Guess: Optuna's gRPC proxy keeps nothing of its own, so that a trial that runs while the proxy is restarted over the same database goes
# on through the new one as if nothing had happened.
#
# Seen with optuna 5.0.0: attributes of the running trial are written, but its next parameter is a KeyError without a text. The proxy
# wraps the database in a cache that knows the study of a trial only after it made or read that trial; setting a parameter asks the cache
# and not the database. Once anybody has read all trials of the study, the same call works. Results that are told work too, so a search
# whose parameters are all set before its long work never sees it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q optuna==5.0.0 grpcio==1.76.0 protobuf==6.33.0 2>/dev/null
cat >"$work/run.py" <<'PY'
import socket
import subprocess
import sys
import warnings

import grpc
import optuna

warnings.simplefilter("ignore")
optuna.logging.set_verbosity(optuna.logging.ERROR)
SERVER = """
import sys, warnings
warnings.simplefilter("ignore")
from optuna.storages import get_storage, run_grpc_proxy_server
run_grpc_proxy_server(get_storage(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]))
"""


def started(port):
    command = [sys.executable, "-c", SERVER, f"sqlite:///{sys.argv[1]}", str(port)]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        grpc.channel_ready_future(channel).result(timeout=60)
    return server


def told(what, call):
    for _ in range(9):  # the first answers may still be of the connection that is gone
        try:
            call()
        except grpc.RpcError:
            continue
        except Exception as error:
            return print(f"{what}: {type(error).__name__}, text {str(error)!r}")
        return print(f"{what}: works")


with socket.socket() as listening:
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
server = started(port)
study = optuna.create_study(storage=optuna.storages.GrpcStorageProxy(host="127.0.0.1", port=port))
trial = study.ask()
told("parameter before", lambda: trial.suggest_float("x", 0, 1))
server.kill()
server.wait()
server = started(port)
told("attribute after the restart", lambda: trial.set_user_attr("a", 1))
told("parameter after the restart", lambda: trial.suggest_float("y", 0, 1))
told("reading all trials", lambda: study.get_trials())
told("parameter again", lambda: trial.suggest_float("y", 0, 1))
told("result", lambda: study.tell(trial, 1.0))
server.kill()
PY
"$work/venv/bin/python" "$work/run.py" "$work/study.db" | tee "$work/out.txt"
diff - "$work/out.txt" <<'OUT'
parameter before: works
attribute after the restart: works
parameter after the restart: KeyError, text ''
reading all trials: works
parameter again: works
result: works
OUT
echo "as stated: a parameter of a running trial is refused until somebody reads the study"
