#!/usr/bin/env bash
# Compiles every .cu file for the architectures we ship, without torch and without a GPU; does nothing where there is no nvcc.
set -euo pipefail
cd "$(dirname "$0")/.."
nvcc=${CUDACXX:-$(command -v nvcc || true)}
[ -n "$nvcc" ] || { echo "no nvcc: the CUDA kernels are not checked"; exit 0; }
stamp=build/.cuda_checked
[ -e "$stamp" ] && [ -z "$(find src/kernels/cuda -newer "$stamp" -type f)" ] && exit 0
cublas=$(echo '#include <cublasLt.h>' | "$nvcc" -E -x cu - > /dev/null 2>&1 && echo yes || true)
for file in src/kernels/cuda/*.cu; do
  if [ -z "$cublas" ] && grep -q '#include <cublasLt.h>' "$file"; then
    echo "$file is not checked: nvcc finds no cublasLt.h (libcublas-dev)"
    continue
  fi
  "$nvcc" -std=c++20 -O2 -Isrc -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=sm_90 \
    -gencode=arch=compute_100,code=sm_100 -Werror all-warnings -c "$file" -o /dev/null
done
mkdir -p build && touch "$stamp"
