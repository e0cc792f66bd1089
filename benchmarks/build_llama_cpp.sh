#!/bin/sh
# Builds llama.cpp's llama-bench and llama-batched-bench from vendored sources.
#
#   benchmarks/build_llama_cpp.sh llama.tar.xz BUILD_FOLDER [extra cmake options]
#
# llama.tar.xz holds `CMakeLists.txt cmake ggml src include common vendor tools licenses` of vendor/llama.cpp in a
# llama-cpp-python source distribution:
#
#   pip download --no-binary llama-cpp-python --no-deps llama-cpp-python==0.3.36
#   tar xzf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
#   tar cJf llama.tar.xz CMakeLists.txt cmake ggml src include common vendor tools licenses
#
# CUDA is used where nvcc is found. CUDA_ARCHITECTURES (default 90), JOBS (default: all cores) and PYTHON (whose
# nvidia-nccl package supplies NCCL, which `-sm tensor` needs to be fast) are read from the environment.
# The binaries come to BUILD_FOLDER/build/bin; build_info.txt beside them says what they are.
set -eu

archive=$1
folder=$2
shift 2
jobs=${JOBS:-$(nproc)}
python=${PYTHON:-python3}

mkdir -p "$folder"
tar xJf "$archive" -C "$folder"

cuda=OFF
nccl=none
if command -v nvcc >/dev/null; then
    cuda=ON
    set -- -DCMAKE_CUDA_ARCHITECTURES="${CUDA_ARCHITECTURES:-90}" "$@"
    root=$("$python" -c 'import importlib.util as u
spec = u.find_spec("nvidia.nccl")
print(list(spec.submodule_search_locations)[0] if spec else "")' 2>/dev/null || true)
    if [ -n "$root" ] && [ -e "$root/lib/libnccl.so.2" ]; then
        # The wheel has no link name for the linker, and may not be ours to write to.
        mkdir -p "$folder/nccl/lib"
        ln -sfn "$root/include" "$folder/nccl/include"
        ln -sf "$root/lib/libnccl.so.2" "$folder/nccl/lib/libnccl.so"
        ln -sf "$root/lib/libnccl.so.2" "$folder/nccl/lib/libnccl.so.2"
        nccl=$root/lib/libnccl.so.2
        absolute=$(cd "$folder/nccl" && pwd)
        set -- -DNCCL_ROOT="$absolute" -DCMAKE_BUILD_RPATH="$root/lib" "$@"
    fi
fi

cmake -S "$folder" -B "$folder/build" -DCMAKE_BUILD_TYPE=Release -DGGML_CUDA=$cuda -DGGML_NATIVE=ON \
    -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF \
    -DLLAMA_OPENSSL=OFF "$@"
cmake --build "$folder/build" --config Release -j "$jobs" --target llama-bench llama-batched-bench

{
    echo "archive sha256: $(sha256sum "$archive" | cut -d' ' -f1)"
    echo "cuda: $cuda, architectures ${CUDA_ARCHITECTURES:-90}, nccl: $nccl, options: $*"
    [ "$cuda" = ON ] && nvcc --version | tail -n 1
    grep -m1 -E '^set\(GGML_VERSION_MAJOR' -A2 "$folder/ggml/CMakeLists.txt" | tr -cd '0-9.\n' | paste -sd. |
        sed 's/^/ggml version: /'
} >"$folder/build/bin/build_info.txt"
cat "$folder/build/bin/build_info.txt"
