-- Expand only: release 1 goes on working beside it.
ALTER TABLE orders ADD COLUMN note text NOT NULL DEFAULT '';
