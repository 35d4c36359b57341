"""How the tests' programs are compiled: quickly, or as users compile them."""

from importlib.metadata import version

# XLA's option -> (what compiles quickly, what users have). Tiny models take longer to compile than
# to run: less than half of it without optimising.
LEVELS = {
    "xla_backend_optimization_level": (0, 3),
    "xla_llvm_disable_expensive_passes": (True, False),
}
# Newer ones have fusion emitters alone, and refuse the option.
if tuple(int(part) for part in version("jaxlib").split(".")[:3]) < (0, 11, 1):
    LEVELS["xla_cpu_use_fusion_emitters"] = (False, True)

QUICK, OPTIMISED = ({name: values[i] for name, values in LEVELS.items()} for i in range(2))


def flags(options):
    """These options as words of XLA_FLAGS."""
    return [f"--{name}={str(value).lower()}" for name, value in options.items()]
