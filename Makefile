# make demo   install, evaluate four selectors on the tiny model and two on the one with Dream, write a report
# make test   run the tests in WORKERS=2 processes          make lint   style, types, import directions
# make app    open the page in the browser: a picture, a question, selectors side by side (docs/app.md)
# make tiny   train the tiny model from scratch on two cores   make adapters   then one LoRA for each selector
#             (MODEL=tiny_dream trains the one on Dream, MODEL=tiny_untied one whose projector has a space of its own)
# make evidence   both for five seeds, then the sweeps of docs/results
# make gpu    on a machine with a GPU, in nine minutes: its tests and the bench at true size, to docs/results/gpu
# make true-size   one answer after the other at the published size on a CPU: 21 GiB of memory, 25 minutes on two cores
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP_ARGS ?=

.PHONY: setup demo app test test-app lint gpu true-size tiny adapters heads rivals lists ranks evidence clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	@echo "installing into $(VENV); this takes a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e '.[dev,viz]'
	@touch $@

demo: setup
	$(BIN)/python eval.py -m study=demo threads=1 resume=true adapter=null,own selector=pooled,full,random,shirg
	$(BIN)/python eval.py -m study=demo threads=1 resume=true model=tiny_dream adapter=own selector=pooled,shirg
	@echo "report: outputs/demo/report.html"

# Gradio asks for a Pillow below 13, which resizes upright pictures differently, and works with 13 (make test-app): it
# is installed into an environment of its own, which sees all packages of the first one and then loses its own Pillow.
APP := $(VENV)/app
APP_STAMP := $(APP)/.installed
$(APP_STAMP): $(STAMP)
	@echo "installing Gradio into $(APP)"
	@$(PYTHON) -m venv $(APP)
	@$(APP)/bin/python -c 'import sysconfig, sys; path = sysconfig.get_path("purelib"); \
	  open(f"{path}/first.pth", "w").write(f"import site; site.addsitedir({sys.argv[1]!r})\n")' \
	  "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	@grep -v '^pillow==' constraints.txt > $(APP)/constraints.txt
	@$(APP)/bin/python -m pip install -qq --disable-pip-version-check $(PIP_ARGS) -c $(APP)/constraints.txt -e '.[app]'
	@$(APP)/bin/python -m pip uninstall -qq --disable-pip-version-check -y pillow
	@touch $@

app: $(APP_STAMP)
	$(APP)/bin/python -m experiments.app

test-app: $(APP_STAMP)
	$(APP)/bin/python -m pytest tests/experiments/app

# A file's tests share one process, and with it what they prepare; files in their order, since a slow one must not be last.
WORKERS ?= 2
test: setup
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The environment of this folder if there is one, else PYTHON: rented machines often bring their own torch.
gpu:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m experiments.bench.gpu

# Pictures of your own: PICTURES=a.png,b.png,c.png, one for each turn.
PICTURES ?=
LM ?= llada
true-size: setup
	$(BIN)/python -m experiments.bench.true_size --device cpu --lm $(LM) --parts systems --engines eager --batch 1 \
		--rounds 3 --answer 16 --steps 4 --seconds 2000 --out docs/results/true_size/$(LM).json \
		$(if $(PICTURES),--pictures $(PICTURES))
	$(BIN)/python -m experiments.bench.roofline docs/results/true_size/$(LM).json

# Each stage starts from the weights of the stage before it. Each ends with a check (its gate); a failed check stops the
# chain. A finished stage is not run again; to start over, delete the folder.
MODEL ?= tiny
SEED ?= 0
THREADS ?= 2
STUDY := $(MODEL)_seed-$(SEED)
TINY := outputs/$(STUDY)
TRAIN := $(BIN)/python train.py study=$(STUDY) seed=$(SEED) resume=true threads=$(THREADS)
# tiny_untied is tiny but for what stands for a word in the stages text and align.
ifeq ($(MODEL),tiny_untied)
CODES := codes=random
LONGER := optim.steps=1600 text.words=0.2 text.fade=0.25 text.ramp=0.15
endif
tiny: setup
	$(TRAIN) stage=vision model=$(MODEL:tiny_untied=tiny)_scratch weights=$(TINY)/vision
	$(TRAIN) stage=text $(CODES) $(LONGER) model.path=$(TINY)/vision weights=$(TINY)/text
	$(TRAIN) stage=align $(CODES) model.path=$(TINY)/text weights=$(TINY)/align
	$(TRAIN) stage=base selector=pooled model.path=$(TINY)/align weights=$(TINY)/base
	@echo "weights: $(TINY)/base; use them with model.path=$(TINY)/base"

# One adapter for each selector, all for the same steps from the same base; `mixed` is trained on five budgets in turn.
ADAPT = $(TRAIN) data=synth_mix_train lora=$(MODEL:tiny_untied=tiny) model.path=$(TINY)/base weights=$(TINY)/base/adapters
adapters: $(addprefix adapter-,pooled full random shirg saint topv llava_scissor mixed)
adapter-%: setup
	$(ADAPT)/$* selector=$*
adapter-mixed: setup
	$(ADAPT)/mixed selector=random 'mix.budgets=[pooled,1/4 base,1/2 base,3/4 base,base]'
# The relevance heads of P2 and of its control that does not read the question, and the adapter on top of the first.
heads: setup
	$(TRAIN) stage=gate model.path=$(TINY)/base weights=$(TINY)/base/relevance
	$(TRAIN) stage=gate head.question=false relevance.base=null gate.recall_sparse=0 gate.recall_unseen=0 model.path=$(TINY)/base weights=$(TINY)/base/relevance_blind
	$(ADAPT)/shirg_learned experiment=P2
# The own adapters of P2's rivals, each trained with the allocation that was best for it, for sweep=learned; those of
# saint, topv and llava_scissor are in `adapters`, trained with all of the budget.
rival_cdpruner := selector=cdpruner context=even
rival_shirg_div := selector=shirg_div context=even context.evidence=0.25
rival_hiprune := selector=hiprune context=even context.evidence=0.75
rival_norm_topk := selector=norm_topk context=even context.evidence=0.75
rivals: $(addprefix rival-,cdpruner shirg_div otprune divprune topv_own saint_vote tome vispruner visionzip holov \
	hiprune norm_topk)
rival-%: setup
	$(ADAPT)/$* $(or $(rival_$*),selector=$*)
# For sweep=long_answers: one adapter for each of its systems, trained on lists, beside a copy of the base and its head.
# Small batches, more steps: with those of stage=adapt (36, 350) some adapters do not learn to look a list up.
LISTS := outputs/$(MODEL)_lists_seed-$(SEED)/base
list_shirg_max := selector=shirg relevance.agg=max
list_shirg_learned := experiment=P2
list_shirg_learned_ranked := experiment=P2 selector.allocation.mode=ranked selector.allocation.mass=null
lists: $(addprefix list-,pooled full oracle random llava_scissor shirg shirg_max shirg_learned shirg_learned_ranked)
$(LISTS): | setup
	mkdir -p $(dir $@) && rm -rf $@.part && cp -r $(TINY)/base $@.part && rm -rf $@.part/adapters && mv $@.part $@
list-%: $(LISTS)
	$(TRAIN) data=synth_list_train objective.answer_tokens=12 lora=$(MODEL:tiny_untied=tiny) batch_size=12 \
		optim.steps=1050 model.path=$(LISTS) weights=$(LISTS)/adapters/$* $(or $(list_$*),selector=$*)
ranks: $(addprefix rank-,16 32 64)
rank-%: setup
	$(ADAPT)/rank_$* selector=shirg lora.rank=$*

# The whole chain once for each seed, then the sweeps over all of them: hours on two cores; it can be stopped and run
# again. Seed 4 does not pass the check of the text stage.
SEEDS ?= 0 1 2 3 5
space := $(subst ,, )
comma := ,
BASES = $(subst $(space),$(comma),$(foreach seed,$(SEEDS),outputs/$(MODEL)_seed-$(seed)/base))
EVAL = $(BIN)/python eval.py model.path=$(BASES) data.n=1152 threads=$(THREADS) resume=true
GLYPHS = 'data.density=[sparse,dense,hard]'
evidence: setup
	for seed in $(SEEDS); do $(MAKE) tiny adapters heads rivals lists ranks SEED=$$seed || exit 1; done
	$(EVAL) sweep=main_table $(GLYPHS)
	$(EVAL) sweep=equal_budget $(GLYPHS)
	$(EVAL) sweep=budget_curve $(GLYPHS)
	$(EVAL) sweep=cache_methods $(GLYPHS)
	$(EVAL) sweep=ablations $(GLYPHS)
	$(EVAL) sweep=lora_rank $(GLYPHS) adapter=rank_16,rank_32,rank_64
	$(EVAL) sweep=learned $(GLYPHS)
	$(EVAL) sweep=even_context $(GLYPHS)
	$(subst $(MODEL)_seed,$(MODEL)_lists_seed,$(EVAL)) sweep=long_answers
	$(EVAL) study=families data=synth_chart,synth_shapes selector=pooled,full,random,shirg adapter=null,own -m

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
