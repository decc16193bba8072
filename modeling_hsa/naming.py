"""
The name of a cache: Transformers calls the argument and output `past_key_values` up to 5.23, and `cache` from 5.24 on.
Models here take both names, whatever the version, and give back the one of the version.
"""

import functools

from transformers.generation.utils import ALL_CACHE_NAMES


CACHE = "cache" if "cache" in ALL_CACHE_NAMES else "past_key_values"


def takes_cache(forward):
    """
    `forward(..., cache=x)` is then `forward(..., past_key_values=x)`. Raises: ValueError if both are given.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        cache = kwargs.pop("cache", None)
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("`cache` and `past_key_values` are two names of the same argument. Give one of them.")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    return wrapper
