"""
Two copies of one class: a model that was loaded from the Hub with its code has classes of its own beside those of the
package, which `isinstance` tells apart. What is the same in both is accepted for the other.
"""

CACHE_FORMAT = 2  # to be raised with every change of what a model calls or reads of a cache


def is_hsa_config(config) -> bool:
    """Whether `config` is an HSAConfig, of any copy, or of a subclass."""
    return any(base.__name__ == "HSAConfig" for base in type(config).__mro__)


def check_cache_class(cache) -> None:
    """
    Raises:
        TypeError: if `cache` is not an HSACache, or the HSACache of a copy of this code with another `CACHE_FORMAT`.
    """
    kinds = {base.__name__ for base in type(cache).__mro__}
    if "HSACache" not in kinds:
        raise TypeError(
            f"`past_key_values` must be an HSACache, got {type(cache).__name__}. Leave it out and pass "
            "`use_cache=True`, or make one with `HSACache(model.config)`."
        )
    if getattr(cache, "format_version", None) != CACHE_FORMAT:
        raise TypeError(
            f"`past_key_values` is an HSACache of another version of HSA for Transformers ({type(cache).__module__}) "
            f"than the model ({__name__}). Leave it out and pass `use_cache=True`; or import `modeling_hsa` before "
            "the model is loaded, which then is of the package too."
        )
