# shellcheck shell=bash
# Settings of the TPU compiler and runtime by generation, in one place. Sourced.
#
# None of them was measured with jaxalign: no TPU has run it yet. What is here is what public JAX
# trainers found to matter; XLA's defaults stand for everything else, asynchronous collectives
# included. LIBTPU_INIT_ARGS that are already set come last and so win.

tpu_flags() {
    case $1 in
        v6e)
            # Fast memory of one operation; the default keeps v6e's larger matrix unit waiting.
            # MaxText, benchmarks/xla_flags_library.py (98304 for dense models); Levanter, "Getting
            # Started on TPU VMs" ("pretty important for performance").
            printf '%s' '--xla_tpu_scoped_vmem_limit_kib=98304'
            ;;
    esac
}
