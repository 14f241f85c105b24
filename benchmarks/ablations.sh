#!/usr/bin/env bash
# What each part of the recipe is worth: the quickstart with a fifth of its tokens (0.8 million) and a mask rate that falls,
# one part changed at a time, three seeds of each setting (of the optimizers' rates one, which finds the rate of each).
# About two hours on two cores that have nothing else to do.
#
#   bash benchmarks/ablations.sh
#   ONLY='optimizer shape' SEEDS=1 bash benchmarks/ablations.sh --config.data.source='text:wiki.txt.gz'
#
# Tables and runs lie in runs/ablations/, or the folder OUT; what is there is not done again. Held-out tokens are masked in
# the same way everywhere, whatever a run was trained on: a run that ends with other masks does not compare, and `sweep`
# says so.
set -euo pipefail
# shellcheck source=launch/setup.sh
. "$(dirname "$0")/../launch/setup.sh" requirements.txt
out=${OUT:-runs/ablations}
code=0
fall='0%: objective.mask_rate->0.15'
groups=(batch rates optimizer mask_rate masking shape packing phases)
for name in ${ONLY:-}; do
  case " ${groups[*]} " in *" $name "*) ;; *) echo "error: ONLY is '$ONLY'; it takes some of: ${groups[*]}" >&2 && exit 2 ;; esac
done

ablate() { # NAME GRID ARGUMENTS...: the others go on where one fails
  local name=$1 grid=$2
  shift 2
  case " ${ONLY:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  python -m flax_mlm.sweep --config=quickstart --config.train.tokens=8e5 --config.train.eval_every=0 \
    --config.train.phases="$fall" --config.eval.max_rows=2000 --seeds="${SEEDS:-3}" --workdir="$out/$name" --grid="$grid" "$@" ||
    code=$?
  if [ "$code" = 75 ]; then exit 75; fi # stopped
}

ablate batch 'train.global_batch_size&optimizer.learning_rate=32&6e-3,16&6e-3,16&3e-3,64&9e-3' "$@"

fields='optimizer.name&optimizer.schedule&optimizer.learning_rate'
rates='' # one seed of each, to find the rate of each optimizer
for optimizer in 'adamw&linear' 'stable_adamw&linear'; do
  for rate in 7.5e-4 1.5e-3 3e-3; do rates="$rates$optimizer&$rate,"; done
done
for rate in 3e-3 6e-3 1.2e-2; do rates="${rates}muon&linear&$rate,"; done
for rate in 1.5e-3 3e-3 6e-3; do rates="${rates}schedule_free&constant&$rate,"; done
for rate in 1e-2 3e-2 1e-1; do rates="${rates}lamb&linear&$rate,"; done
SEEDS=1 ablate rates "$fields=${rates%,}" "$@"
best='adamw&linear&1.5e-3,stable_adamw&linear&1.5e-3,muon&linear&6e-3,schedule_free&constant&3e-3,lamb&linear&3e-2'
ablate optimizer "$fields=$best" "$@"

down="\"$fall\""
ablate mask_rate "objective.mask_rate&train.phases=0.3&$down,0.15&,0.3&,0.4&,0.4&$down" "$@"
# The last tenth is masked as the evaluation is.
last='objective.mask_rate=0.15, objective.masking=token"'
ablate masking "objective.masking&train.phases=token&\"90%: $last,whole_word&\"90%: $last,span&\"90%: $last" "$@"
ablate shape "model.norm_position&model.glu&model.intermediate_size=pre&true&352,post&true&352,pre&false&528" "$@"
ablate packing "data.packing&objective.attend_across_documents=best_fit&false,best_fit&true,sequential&true" "$@"
# What moves does so over its own phase: in parts, so that the mask rate falls as in the run that they compare with.
ramp='"0%: objective.mask_rate->0.27, train.global_batch_size=8; 20%: objective.mask_rate->0.24, train.global_batch_size=16'
ramp="$ramp; 40%: objective.mask_rate->0.15, train.global_batch_size=32\""
short='"0%: objective.mask_rate->0.18, data.seq_len=32, train.global_batch_size=64'
short="$short; 80%: objective.mask_rate->0.15, data.seq_len=64, train.global_batch_size=32\""
ablate phases "train.phases=$down,$ramp,$short" "$@"
exit "$code"
