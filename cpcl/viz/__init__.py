"Figures: ranked lists, cluster montages, curves of a run, a map of both modalities, tables of results."

from .._front_door import front_door

__getattr__, __dir__, __all__ = front_door(
    __name__,
    style="COLOURS palette save_figure",
    pictures="ranked_lists cluster_montage pick_clusters",
    curves="label_curves loss_curves stage_seconds",
    tsne="tsne_map tsne_points",
    results="scores_table scores_bars",
)
