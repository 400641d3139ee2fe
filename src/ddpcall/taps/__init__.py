"""Reversible instrumentation: the only room that touches a subject.

Every tap returns its undo, a callable that puts back exactly what was there, in any order and also after an
exception. Probes and watch are built on these and nothing else.
"""

from ddpcall.taps.call_site import (
    NOWHERE,
    TORCH,
    CallSite,
    find_call_frames,
    find_call_frames_among,
    find_call_site,
    is_installed_file,
    is_user_file,
    site_of,
)
from ddpcall.taps.counting import (
    HOOK_DICTS,
    TIMED,
    Span,
    SpanLog,
    SpanPlace,
    count_forwards,
    count_global_hook,
    count_hook,
    count_registered_hooks,
    name_function,
    name_hooks,
    requires_gradient,
    time_hooks,
)
from ddpcall.taps.forward import (
    ForwardObserver,
    ForwardTap,
    came_through_call,
    outside_dynamo,
    strip_forward_taps,
    suspend_forward_taps,
)
from ddpcall.taps.reducer import (
    ReducerLog,
    hook_arrival,
    is_lazy,
    tap_gradient_arrivals,
    tap_lazy_reducer,
    tap_reducer,
)
from ddpcall.taps.undo import (
    Undo,
    find_tensors,
    in_backward,
    remove_handles,
    replace_attribute,
    wrap_method,
)

__all__ = [
    "HOOK_DICTS",
    "NOWHERE",
    "TIMED",
    "TORCH",
    "CallSite",
    "ForwardObserver",
    "ForwardTap",
    "ReducerLog",
    "Span",
    "SpanLog",
    "SpanPlace",
    "Undo",
    "came_through_call",
    "count_forwards",
    "count_global_hook",
    "count_hook",
    "count_registered_hooks",
    "find_call_frames",
    "find_call_frames_among",
    "find_call_site",
    "find_tensors",
    "hook_arrival",
    "in_backward",
    "is_installed_file",
    "is_lazy",
    "is_user_file",
    "name_function",
    "name_hooks",
    "outside_dynamo",
    "remove_handles",
    "replace_attribute",
    "requires_gradient",
    "site_of",
    "strip_forward_taps",
    "suspend_forward_taps",
    "tap_gradient_arrivals",
    "tap_lazy_reducer",
    "tap_reducer",
    "time_hooks",
    "wrap_method",
]
