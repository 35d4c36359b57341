# shellcheck shell=bash
# TPU generations as Cloud TPU and GKE name them. Sourced after common.sh.
# shellcheck disable=SC2034  # the variables are for the file that sources this one
#
# Types and sizes: Cloud TPU docs "TPU v5e", "TPU v5p", "TPU v6e", "TPU v4"; software versions:
# "TPU software versions"; node labels and machine types: GKE docs "Plan TPUs in GKE".
# TPU7x is not here: Google offers it in GKE only, and nothing of ours knows it yet.

# The chips of a slice of v5e or v6e by topology; other generations are built from 4x4x4 cubes.
FLAT_TOPOLOGIES="1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16"
FLAT_SIZES=" 1 4 8 16 32 64 128 256 "

# v5litepod-16 -> GENERATION=v5e RUNTIME=v2-alpha-tpuv5-lite MACHINES=4 (of one slice)
read_accelerator() {
    local size=${1##*-} chips
    [[ $size =~ ^[1-9][0-9]*$ ]] || unknown_accelerator "$1"
    case $1 in
        v5litepod-*) GENERATION=v5e RUNTIME=v2-alpha-tpuv5-lite chips=$size ;;
        v6e-*) GENERATION=v6e RUNTIME=v2-alpha-tpuv6e chips=$size ;;
        # The number counts TensorCores, two a chip.
        v5p-*) GENERATION=v5p RUNTIME=v2-alpha-tpuv5 chips=$((size / 2)) ;;
        v4-*) GENERATION=v4 RUNTIME=tpu-ubuntu2204-base chips=$((size / 2)) ;;
        *) unknown_accelerator "$1" ;;
    esac
    case $GENERATION in
        v5e | v6e)
            [[ $FLAT_SIZES == *" $size "* ]] ||
                die "--accelerator: $1 does not exist; ${1%-*} comes in sizes$FLAT_SIZES"
            # Up to eight chips share one machine.
            MACHINES=$((chips <= 8 ? 1 : chips / 4))
            ;;
        *)
            ((size % 8 == 0)) || die "--accelerator: $1 does not exist; ${1%-*} counts in eights"
            MACHINES=$((chips / 4))
            ;;
    esac
}

unknown_accelerator() {
    die "--accelerator: '$1' is unknown; known are v5litepod-16, v6e-8, v5p-32, v4-32 and other" \
        "sizes of these"
}

# v6e 4x4 -> LABEL=tpu-v6e-slice CHIPS=16 (of one slice)
read_topology() {
    case $1 in
        v5e) LABEL=tpu-v5-lite-podslice ;;
        v6e) LABEL=tpu-v6e-slice ;;
        v5p) LABEL=tpu-v5p-slice ;;
        v4) LABEL=tpu-v4-podslice ;;
        *) die "--accelerator: '$1' is unknown; known are v5e, v6e, v5p and v4" ;;
    esac
    case $1 in
        v5e | v6e)
            [[ " $FLAT_TOPOLOGIES " == *" $2 "* ]] ||
                die "--topology: $1 has no '$2'; it has $FLAT_TOPOLOGIES"
            ;;
        *)
            [[ $2 =~ ^[1-9][0-9]*x[1-9][0-9]*x[1-9][0-9]*$ ]] ||
                die "--topology: '$2' should be three numbers for $1, as in 2x2x4"
            ;;
    esac
    CHIPS=$((${2//x/ * }))
}
