-- A mistake on purpose, of the kind that happens: it forgets the orders imported from the old shop, which have no price
-- and lose their total here. Staging has no imported orders, so nobody saw it there.
ALTER TABLE orders DROP CONSTRAINT orders_unit_cents_check;
UPDATE orders SET unit_cents = 0 WHERE unit_cents IS NULL;
UPDATE orders SET total_cents = quantity * unit_cents;
