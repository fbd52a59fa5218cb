#!/usr/bin/env bash
# Can this machine's GPUs be trusted with a training run? About ten minutes; the exit status says.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python
check_package
exec "$PYTHON" -m vishwamai_mp.launch.gpu_acceptance "$@"
