"Pseudo labels: neighbours, Jaccard distance, DBSCAN or HDBSCAN, without any N x N matrix."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    labels="ClusterConfig ClusterReport pseudo_labels cluster_images",
    eps="auto_eps eps_curve eps_plot",
    jaccard="jaccard_graph",
)
