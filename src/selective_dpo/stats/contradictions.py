"""Preferences that contradict each other: cycles among the answers to one prompt."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def contradicting(group_P: ArrayLike, chosen_P: ArrayLike, rejected_P: ArrayLike) -> NDArray[np.bool_]:
    """Whether each pair's preference is on a cycle of its group: a over b and b over a, or a > b > c > a. [P]

    No ranking of a group's answers agrees with all pairs of a cycle, so one label of it at least is wrong, or
    says nothing. A pair is on a cycle exactly where both of its answers are in one strongly connected
    component of the graph with an edge from each chosen answer to its rejected one (Tarjan 1972).

    Shapes: all [P], sortable labels of groups and of answers.
    """
    groups, answers = np.asarray(group_P), np.concatenate([chosen_P, rejected_P])
    _, group_2P = np.unique(np.concatenate([groups, groups]), return_inverse=True)
    _, answer_2P = np.unique(answers, return_inverse=True)
    _, node_2P = np.unique(group_2P * (answer_2P.max(initial=0) + 1) + answer_2P, return_inverse=True)
    chosen_node_P, rejected_node_P = np.split(node_2P, 2)
    size = int(node_2P.max(initial=-1)) + 1
    edges = coo_array((np.ones(len(groups)), (chosen_node_P, rejected_node_P)), shape=(size, size))
    component_N = connected_components(edges.tocsr(), directed=True, connection="strong")[1]
    return np.asarray(component_N[chosen_node_P] == component_N[rejected_node_P])


def joined(label_N: ArrayLike, first_E: ArrayLike, second_E: ArrayLike) -> NDArray[np.intp]:
    """Labels 0 to n - 1 as numbers that are equal where links join them, directly or through others: [N].

    Each link e joins the labels first_E[e] and second_E[e]; `label_N` holds every label from 0 on.
    """
    labels = np.asarray(label_N, dtype=np.intp)
    size = int(labels.max(initial=-1)) + 1
    links = coo_array((np.ones(len(np.asarray(first_E))), (first_E, second_E)), shape=(size, size))
    return np.asarray(connected_components(links.tocsr(), directed=False)[1][labels], dtype=np.intp)
