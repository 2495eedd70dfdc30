#!/bin/bash
# quack-kernels 0.6.5 can be imported only from a folder that is called site-packages (or dist-packages).
#
# Its epilogues are fingerprinted as it is imported: source, closures and globals of each function, recursively. Functions
# of other distributions are to be left out of that, and are known by their file's path: "/site-packages/" or
# "/dist-packages/" must be in it (quack/gemm_runtime/identity.py, _is_extern_function). Where pip puts them elsewhere,
# as `pip install --target` does (layers of functions as a service, vendored folders, Bazel, PYTHONPATH), CUTLASS' own
# functions are followed to globals that have no fingerprint, and the import of any fused kernel ends in a TypeError.
#
# Expected: an import that does not depend on the folder's name. Seen with quack-kernels 0.6.5, nvidia-cutlass-dsl 4.8.1
# and torch 2.13.0 (no GPU is needed to import), the same files under two names:
#   libs: TypeError: epilogue fn depends on <ContextVar name='_LOC_TRANSFORMS' ...>, which has no fail-closed semantic key
#   site-packages: imported
#
# Exit 1 if that changes. Needs python 3.11 and network access to a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 triton==3.7.1 numpy==2.4.6
"$work/venv/bin/pip" install -q --disable-pip-version-check --no-deps --target "$work/libs" quack-kernels==0.6.5 \
    nvidia-cutlass-dsl==4.8.1 nvidia-cutlass-dsl-libs-base==4.8.1 nvidia-cutlass-dsl-libs-core==4.8.1 \
    nvidia-cutlass-dsl-libs-cu12==4.8.1 apache-tvm-ffi==0.1.15.post2 torch-c-dlpack-ext==0.1.5 einops==0.8.2 \
    cuda-bindings==13.5.0 cuda-pathfinder==1.9.1 cuda-python==13.4.4 cuda-core==1.2.2 ml_dtypes==0.6.0 protobuf==7.36.2
cat > "$work/import.py" <<'PY'
import site
import sys

site.addsitedir(sys.argv[1])  # as for site-packages: its .pth files count
try:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy  # noqa: F401
except TypeError as error:
    print("TypeError:", str(error).partition(". Supported:")[0])
else:
    print("imported")
PY
cd "$work"
elsewhere=$("$work/venv/bin/python" import.py "$work/libs" 2>/dev/null)
mkdir named
mv libs named/site-packages
usual=$("$work/venv/bin/python" import.py "$work/named/site-packages" 2>/dev/null)
echo "libs: $elsewhere"
echo "site-packages: $usual"
[[ $elsewhere == "TypeError: epilogue fn depends on "*"no fail-closed semantic key" && $usual == imported ]]
