"""The inner loops of `local-search`, compiled by numba; imported only when it solves.

Simulated annealing (Kirkpatrick et al. 1983) on moves of one neuron and swaps of two. Loads may pass their limits on
the way, at a price that rises as it cools (as in Johnson et al. 1989 for graph bisection): a move has P − 1 places to
try, a swap m, so that moves find the good ones sooner. Only placements within the limits count as incumbents. A kernel
runs `steps` proposals at one temperature and changes its arrays in place. Gains are kept up to date as in Fiduccia and
Mattheyses (1982), so that a proposal that is refused, as nearly all are, costs a few reads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

_compiled = njit(cache=True, nogil=True)
_UNIT = 2.0**-53
_HOPELESS = 12.0
"""Changes above this many temperatures, accepted six times in a million, are refused without a random number."""
_GAIN = 1e-9
"""An incumbent must be better by this many temperatures: less is rounding."""


@_compiled
def _random(state):
    """The next of Marsaglia's xorshift64 (2003)."""
    s = state[0]
    s ^= s << np.uint64(13)
    s ^= s >> np.uint64(7)
    s ^= s << np.uint64(17)
    state[0] = s
    return s


@_compiled
def _pick(state, m, P):
    """A neuron, and m + k for a move to worker k or, a quarter of the time, another neuron to swap with."""
    s = _random(state)
    neuron = np.int64(((s >> np.uint64(32)) * np.uint64(m)) >> np.uint64(32))
    low = s & np.uint64(0xFFFFFFFF)
    if s & np.uint64(3) != np.uint64(0):
        return neuron, m + np.int64((low * np.uint64(P)) >> np.uint64(32))
    return neuron, np.int64((low * np.uint64(m)) >> np.uint64(32))


@_compiled
def _threshold(state, temperature):
    """What a change may cost to be accepted: Metropolis' rule, its random number drawn first."""
    return -temperature * math.log((np.float64(_random(state) >> np.uint64(11)) + 1.0) * _UNIT)


@_compiled
def _excess(load, capacity, min_load):
    over = max(0.0, load - capacity, min_load - load)
    return over * over


@_compiled
def _excess_change(load, neuron_load, capacity, min_load, i, partner, a, b):
    """Change of the squared loads outside the limits if i goes to b and its partner (none if ≥ m) to a."""
    carried = neuron_load[i]
    if partner < len(neuron_load):
        carried -= neuron_load[partner]
    if carried == 0.0:
        return 0.0
    before = _excess(load[a], capacity[a], min_load[a]) + _excess(load[b], capacity[b], min_load[b])
    after_a = _excess(load[a] - carried, capacity[a], min_load[a])
    return after_a + _excess(load[b] + carried, capacity[b], min_load[b]) - before


@_compiled
def _is_within(load, capacity, min_load):
    outside = 0.0
    for k in range(len(load)):
        outside += _excess(load[k], capacity[k], min_load[k])
    return outside == 0.0


@_compiled
def _carry(load, neuron_load, i, a, b):
    load[a] -= neuron_load[i]
    load[b] += neuron_load[i]


# ------------------------------------------------------------------ nothing is pruned: a price wherever a net has a pin


@_compiled
def gains(pins_start, pins, price, fixed, owner, count, leave, enter):
    """Fill `leave` (m,), what goes if a neuron leaves its worker, and `enter` (m, P), what comes if it enters one.

    `enter` keeps its infinite entries: places that are forbidden.
    """
    m, P = enter.shape
    for i in range(m):
        for k in range(P):
            if enter[i, k] < np.inf:
                enter[i, k] = fixed[i, k]
        for place in range(pins_start[i], pins_start[i + 1]):
            j = pins[place]
            for k in range(P):
                if count[j, k] == 0:
                    enter[i, k] += price[j, k]
        leave[i] = _alone(pins_start, pins, price, fixed, count, i, owner[i])


@_compiled
def _alone(pins_start, pins, price, fixed, count, i, k):
    """Fixed cost of neuron i on its worker k, and the price of what it alone reads there."""
    total = fixed[i, k]
    for place in range(pins_start[i], pins_start[i + 1]):
        j = pins[place]
        if count[j, k] == 1:
            total += price[j, k]
    return total


@_compiled
def _move(pins_start, pins, nets_start, nets, price, fixed, owner, count, leave, enter, i, a, b):
    """Neuron i goes from worker a to b; O(its pins · their readers) for the few nets whose first or last pin moves."""
    owner[i] = b
    for place in range(pins_start[i], pins_start[i + 1]):
        j = pins[place]
        count[j, a] -= 1
        paid = price[j, a]
        if paid > 0.0:
            if count[j, a] == 0:
                for pin in range(nets_start[j], nets_start[j + 1]):
                    enter[nets[pin], a] += paid
            elif count[j, a] == 1:
                for pin in range(nets_start[j], nets_start[j + 1]):
                    if owner[nets[pin]] == a:
                        leave[nets[pin]] += paid
                        break
        count[j, b] += 1
        paid = price[j, b]
        if paid > 0.0:
            if count[j, b] == 1:
                for pin in range(nets_start[j], nets_start[j + 1]):
                    enter[nets[pin], b] -= paid
            elif count[j, b] == 2:
                for pin in range(nets_start[j], nets_start[j + 1]):
                    if owner[nets[pin]] == b and nets[pin] != i:
                        leave[nets[pin]] -= paid
                        break
    leave[i] = _alone(pins_start, pins, price, fixed, count, i, b)


@_compiled
def _shared(pins_start, pins, price, count, mark, stamp, i, partner, a, b):
    """What the gains of a swap count too much: the nets that both neurons read stay on both workers."""
    for place in range(pins_start[i], pins_start[i + 1]):
        mark[pins[place]] = stamp
    total = 0.0
    for place in range(pins_start[partner], pins_start[partner + 1]):
        j = pins[place]
        if mark[j] == stamp:
            if count[j, a] == 1:
                total += price[j, a]
            if count[j, b] == 1:
                total += price[j, b]
    return total


@_compiled
def anneal_nets(
    pins_start, pins, nets_start, nets, price, fixed, neuron_load, capacity, min_load, strictness,
    owner, load, count, leave, enter, mark, state, cost, best, best_owner, steps, temperature,
):  # fmt: skip
    """`steps` proposals; gives (cost, best cost) and leaves the best owners in `best_owner`."""
    m, P = enter.shape
    for _ in range(steps):
        i, partner = _pick(state, m, P)
        a = owner[i]
        b = owner[partner] if partner < m else partner - m
        if a == b:
            continue
        change = enter[i, b] - leave[i]
        if partner < m:
            change += enter[partner, a] - leave[partner]
        excess = temperature * strictness * _excess_change(load, neuron_load, capacity, min_load, i, partner, a, b)
        if change + excess > _HOPELESS * temperature:
            continue
        most = _threshold(state, temperature) - excess
        if change >= most:
            continue
        if partner < m:
            mark[-1] += 1
            change += _shared(pins_start, pins, price, count, mark, mark[-1], i, partner, a, b)
            if change >= most:
                continue
            _move(pins_start, pins, nets_start, nets, price, fixed, owner, count, leave, enter, partner, b, a)
            _carry(load, neuron_load, partner, b, a)
        _move(pins_start, pins, nets_start, nets, price, fixed, owner, count, leave, enter, i, a, b)
        _carry(load, neuron_load, i, a, b)
        cost += change
        if cost < best - _GAIN * temperature and _is_within(load, capacity, min_load):
            best = cost
            best_owner[:] = owner
    return cost, best


# ------------------------------------------------ nothing is pruned, and the busiest worker's priced bytes are the cost


@_compiled
def _transfer_changes(pins_start, pins, price, home, count, traffic, i, k, sign):
    """Neuron i enters (sign 1) or leaves (−1) worker k: counts and traffic follow; O(its pins)."""
    for place in range(pins_start[i], pins_start[i + 1]):
        j = pins[place]
        before = count[j, k]
        count[j, k] = before + sign
        if before + (sign - 1) // 2 == 0 and home[j] != k:
            traffic[0, home[j]] += sign * price[j, k]
            traffic[1, k] += sign * price[j, k]


@_compiled
def busiest_cost(traffic, evenness):
    """The busiest worker's traffic, plus a little of the sum of squares, which leads where the maximum is flat."""
    most, squares = 0.0, 0.0
    for way in range(2):
        for k in range(traffic.shape[1]):
            most = max(most, traffic[way, k])
            squares += traffic[way, k] * traffic[way, k]
    return most + evenness * squares


@_compiled
def anneal_busiest(
    pins_start, pins, price, home, fixed, allowed, neuron_load, capacity, min_load, strictness, evenness,
    owner, load, count, traffic, state, cost, best, best_owner, steps, temperature,
):  # fmt: skip
    """As `anneal_nets`; a proposal is made and, if refused, taken back: O(pins of the two neurons + P)."""
    m, P = fixed.shape
    for _ in range(steps):
        i, partner = _pick(state, m, P)
        a = owner[i]
        b = owner[partner] if partner < m else partner - m
        if a == b or not allowed[i, b] or (partner < m and not allowed[partner, a]):
            continue
        excess = temperature * strictness * _excess_change(load, neuron_load, capacity, min_load, i, partner, a, b)
        if excess > _HOPELESS * temperature:
            continue
        before = busiest_cost(traffic, evenness)
        change = fixed[i, b] - fixed[i, a]
        _transfer_changes(pins_start, pins, price, home, count, traffic, i, a, -1)
        _transfer_changes(pins_start, pins, price, home, count, traffic, i, b, 1)
        if partner < m:
            change += fixed[partner, a] - fixed[partner, b]
            _transfer_changes(pins_start, pins, price, home, count, traffic, partner, b, -1)
            _transfer_changes(pins_start, pins, price, home, count, traffic, partner, a, 1)
        change += busiest_cost(traffic, evenness) - before
        if change >= _threshold(state, temperature) - excess:
            if partner < m:
                _transfer_changes(pins_start, pins, price, home, count, traffic, partner, a, -1)
                _transfer_changes(pins_start, pins, price, home, count, traffic, partner, b, 1)
            _transfer_changes(pins_start, pins, price, home, count, traffic, i, b, -1)
            _transfer_changes(pins_start, pins, price, home, count, traffic, i, a, 1)
            continue
        owner[i] = b
        _carry(load, neuron_load, i, a, b)
        if partner < m:
            owner[partner] = a
            _carry(load, neuron_load, partner, b, a)
        cost += change
        if cost < best - _GAIN * temperature and _is_within(load, capacity, min_load):
            best = cost
            best_owner[:] = owner
    return cost, best


# ----------------------------------------------------------- what is not sent is lost: min(price, energy) for each pair


@_compiled
def _swap_change(energy, price, held, i, partner, a, b):
    """Change of Σ_j min(price, held) on workers a and b; O(n). `held` and `price` are (P, n), `energy` (m + 1, n)."""
    change = 0.0
    for j in range(energy.shape[1]):
        shift = energy[i, j] - energy[partner, j]
        change += min(held[a, j] - shift, price[a, j]) - min(held[a, j], price[a, j])
        change += min(held[b, j] + shift, price[b, j]) - min(held[b, j], price[b, j])
    return change


@_compiled
def anneal_energies(
    energy, price, fixed, allowed, neuron_load, capacity, min_load, strictness,
    owner, load, held, state, cost, best, best_owner, steps, temperature,
):  # fmt: skip
    """As `anneal_nets`, for pins that are energies; row m of `energy` is zeros, the partner of a move."""
    m, P = fixed.shape
    for _ in range(steps):
        i, partner = _pick(state, m, P)
        a = owner[i]
        b = owner[partner] if partner < m else partner - m
        if a == b or not allowed[i, b] or (partner < m and not allowed[partner, a]):
            continue
        excess = temperature * strictness * _excess_change(load, neuron_load, capacity, min_load, i, partner, a, b)
        if excess > _HOPELESS * temperature:
            continue
        row = min(partner, m)
        change = fixed[i, b] - fixed[i, a] + _swap_change(energy, price, held, i, row, a, b)
        if partner < m:
            change += fixed[partner, a] - fixed[partner, b]
        if change >= _threshold(state, temperature) - excess:
            continue
        for j in range(energy.shape[1]):
            shift = energy[i, j] - energy[row, j]
            held[a, j] -= shift
            held[b, j] += shift
        owner[i] = b
        _carry(load, neuron_load, i, a, b)
        if partner < m:
            owner[partner] = a
            _carry(load, neuron_load, partner, b, a)
        cost += change
        if cost < best - _GAIN * temperature and _is_within(load, capacity, min_load):
            best = cost
            best_owner[:] = owner
    return cost, best
