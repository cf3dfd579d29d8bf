"""In how many steps, and in how much time, K-FAC trains a network to what a tuned first-order method reaches.

    python experiments/train_kfac.py --config configs/kfac_gnn.yaml
    python experiments/train_kfac.py --config configs/kfac_vit.yaml --data.root path/to/images --share 0/2
    python experiments/train_kfac.py --config configs/kfac_gnn.yaml --report_only true

Every contestant gets the same number of tuning trials on a split that is not reported; each budget of steps has a schedule of its own; then
every budget is run with several seeds and scored on the test split. Each training is a JSON file in the folder of results, and one that is
there is not run again: an interrupted study goes on where it was, and `--share i/n` divides it over n processes. The folder of the same
name beside this file holds the parts.
"""

from __future__ import annotations

from train_kfac.command import main

if __name__ == "__main__":
    main(__doc__)
